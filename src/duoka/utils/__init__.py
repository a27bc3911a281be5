"""Small building blocks without state: text, files, random-number states, nested containers, validation."""
