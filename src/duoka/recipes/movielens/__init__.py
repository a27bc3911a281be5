"""Recipe ``movielens``: films for people, by what they have seen and by what is written about both."""
