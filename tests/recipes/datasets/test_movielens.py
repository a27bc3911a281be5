"""MovieLens-1M: reading, errors, splits, and synthetic ratings with a known ground truth."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from duoka.errors import ConfigError, DataError
from duoka.recipes.datasets import movielens, synthetic_movielens
from duoka.recipes.datasets.download import RemoteFile
from duoka.recipes.datasets.movielens import ML1MDataset, SeenItems

USERS = ["7::F::1::10::48067", "3::M::56::16::70072-1234", "12::M::25::0::55117"]
FILMS = [
    "1::Toy Story (1995)::Animation|Children's|Comedy",
    "30::Léon: The Professional (1994)::Crime",
    "9::Heat::Drama",
]
RATINGS = [
    f"{user}::{film}::{1 + (user + film) % 5}::{978300000 + user - film}" for user in (7, 3, 12) for film in (1, 30, 9)
]


def write_files(folder: Path, users=USERS, films=FILMS, ratings=RATINGS, end: str = "\n") -> Path:
    folder.mkdir(exist_ok=True)
    for name, lines in (("users.dat", users), ("movies.dat", films), ("ratings.dat", ratings)):
        (folder / name).write_bytes((end.join(lines) + end).encode("latin-1"))
    return folder


def read(folder: Path, **options) -> ML1MDataset:
    return ML1MDataset(folder, split_ratio=[0.4, 0.3, 0.3], **options)


def test_users_films_and_ratings_are_those_of_the_files(tmp_path):
    data = read(write_files(tmp_path))
    assert data.user_ids.tolist() == [3, 7, 12]
    assert data.item_ids.tolist() == [1, 9, 30]
    assert data.user_texts[:2] == ["male\naged 56 or older\nself-employed", "female\naged under 18\nK-12 student"]
    assert data.item_texts == [
        "Animation, Children's, Comedy\nToy Story (1995)",
        "Drama\nHeat",
        "Crime\nLéon: The Professional (1994)",
    ]
    assert data.titles[2] == "Léon: The Professional (1994)"
    rows = set()
    for part in (data.train, data.validation, data.test):
        assert part.pairs.dtype == np.int64
        ids = zip(data.user_ids[part.users], data.item_ids[part.items], part.stars, part.times, strict=True)
        rows |= {"::".join(map(str, row)) for row in ids}
    assert rows == set(RATINGS)
    assert data.user_index(12) == 2
    with pytest.raises(DataError, match=r"no user 4 in .*users.dat: its 3 users are 3 to 12"):
        data.user_index(4)


def test_windows_line_ends_and_a_missing_last_one_are_read(tmp_path):
    write_files(tmp_path / "a", end="\r\n")
    folder = write_files(tmp_path / "b")
    (folder / "ratings.dat").write_text("\n".join(RATINGS))
    assert np.array_equal(read(tmp_path / "a").train.pairs, read(tmp_path / "b").train.pairs)


@pytest.mark.parametrize(
    ("name", "lines", "words"),
    [
        ("ratings", [*RATINGS[:2], "7::9::4"], r"ratings.dat, line 3 has 3 fields .* where 4 are due: write UserID::MovieID"),
        ("ratings", [*RATINGS[:2], "7::9::4::5::6"], "ratings.dat, line 3 has 5 fields"),
        ("ratings", [*RATINGS[:2], "7::9::4::5::6", "7::1"], "ratings.dat, line 3 has 5 fields"),
        ("ratings", [*RATINGS[:2], "7:9:4:5"], "ratings.dat, line 3 has 1 field"),
        ("ratings", [RATINGS[0], "7:9::4::5:6"], "ratings.dat, line 2 has 3 fields"),
        ("ratings", [RATINGS[0], "7:3:9:4:4:4:5"], "ratings.dat, line 2 has 1 field"),
        ("ratings", [RATINGS[0], "7::9::::5"], "line 2: Rating is ''"),
        ("ratings", [RATINGS[0], "7::9::4.5::5"], "line 2: Rating is '4.5': it must be a whole number"),
        ("ratings", [RATINGS[0], "7::x::4::5"], "line 2: MovieID is 'x'"),
        ("ratings", [RATINGS[0], "7::9::4::99999999999999999999"], "line 2: Timestamp is '99999999999999999999'"),
        ("ratings", [RATINGS[0], "", RATINGS[1]], "line 2 is empty: remove it"),
        ("ratings", [RATINGS[0], "7::9::6::5"], r"line 2: the rating is 6: it must be 1 to 5"),
        ("ratings", [RATINGS[0], "7::9::0::5"], "line 2: the rating is 0"),
        ("ratings", [RATINGS[0], "8::9::4::5"], "line 2: user 8 is not in users.dat"),
        ("ratings", [RATINGS[0], "7::8::4::5"], "line 2: film 8 is not in movies.dat"),
        ("ratings", [RATINGS[0], "7::9::4::5", "7::9::3::6"], "line 3: the same user has rated the same film in line 2"),
        ("ratings", ["\u00e97::9::4::5"], "line 1: UserID is 'é7'"),
        ("ratings", ["\0" + RATINGS[0]], "line 1: the byte 0x00 is no character"),
        ("users", ["7::F::1::10"], "users.dat, line 1 has 4 fields"),
        ("users", [USERS[0], "3::X::1::1::2"], "line 2: the gender is 'X': choose one of F, M"),
        ("users", ["3::F::2::1::2"], "line 1: the age group is 2: choose one of 1, 18"),
        ("users", ["3::F::1::21::2"], "line 1: the occupation is 21"),
        ("users", [USERS[0], USERS[0]], "line 2: user 7 is in line 1 already"),
        ("films", ["1::Toy Story"], "movies.dat, line 1 has 2 fields"),
        ("films", [FILMS[0], "2::::Drama"], "line 2: film 2 has no title: write MovieID::Title"),
        ("films", [FILMS[0], "2::Heat::"], "line 2: film 2 has no genres"),
        ("films", [FILMS[0], "2::Heat::Drama|"], "line 2: film 2 has no name for one of its genres"),
        ("films", [FILMS[0], "1::Heat::Drama"], "line 2: film 1 is in line 1 already"),
        ("films", ["1::It\x92s a Gift::Comedy"], "line 1: the byte 0x92 is no character of ISO 8859-1"),
        ("films", [], "movies.dat, line 1 is empty|movies.dat is empty"),
    ],
)  # fmt: skip
def test_line_that_does_not_fit_is_named_with_its_file(tmp_path, name, lines, words):
    with pytest.raises(DataError, match=words):
        read(write_files(tmp_path, **{name: lines}))


def test_utf8_is_not_read_as_latin_1(tmp_path):
    folder = write_files(tmp_path)
    (folder / "movies.dat").write_text("\n".join(FILMS), encoding="utf-8")
    with pytest.raises(DataError, match=r"movies.dat, line 2: the text is UTF-8, .* iconv"):
        read(folder)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"neither users.dat, movies.dat, ratings.dat, nor ml-1m, nor ml-1m.zip, .*: allow"
    ):
        read(tmp_path)
    (write_files(tmp_path) / "movies.dat").unlink()
    with pytest.raises(DataError, match=r"lacks movies.dat: unpack"):
        read(tmp_path)


def test_emptied_folder_is_an_error(tmp_path):
    (tmp_path / "ml-1m").mkdir()
    (tmp_path / "ml-1m.zip").write_bytes(b"PK")
    for download in (True, False):
        with pytest.raises(DataError, match=r"ml-1m holds none of users.dat, movies.dat, ratings.dat: delete it"):
            read(tmp_path, download=download)


def test_archive_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "ml-1m.zip").write_bytes(b"PK")
    (tmp_path / "ratings.dat").write_text("1::2::5::978300760")
    with pytest.raises(
        DataError, match=f"ratings.dat is a file, not a folder: give the folder of the data: --root {tmp_path}"
    ):
        ML1MDataset(tmp_path / "ratings.dat", download=False)
    with pytest.raises(DataError, match=r"ml-1m.zip is a file, not a folder: unpack it with `unzip"):
        read(tmp_path / "ml-1m.zip")


def test_metadata_distinguish_sets(tmp_path):
    facts = read(write_files(tmp_path / "a")).metadata()
    assert facts == read(write_files(tmp_path / "b", end="\r\n")).metadata()
    assert [facts[key] for key in ("users", "films", "train", "validation", "test")] == [3, 3, 4, 2, 3]
    renamed = read(write_files(tmp_path / "c", films=[*FILMS[:2], "9::Cold::Drama"])).metadata()
    assert {key for key in facts if facts[key] != renamed[key]} == {"entities"}
    swapped = read(write_files(tmp_path / "d", ratings=RATINGS[::-1])).metadata()
    assert {key for key in facts if facts[key] != swapped[key]} == {"parts"}


def test_archive_is_downloaded_verified_and_unpacked_once(tmp_path, monkeypatch):
    write_files(tmp_path / "ml-1m")
    (tmp_path / "server").mkdir()
    archive = tmp_path / "server" / "ml-1m.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted((tmp_path / "ml-1m").iterdir()):
            packed.write(path, f"ml-1m/{path.name}")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(movielens, "ARCHIVE", RemoteFile(archive.as_uri(), None, digest))
    root = tmp_path / "root"
    assert len(read(root, download=True).titles) == 3
    archive.unlink()
    assert read(root).folder == root / "ml-1m"
    (root / "ml-1m.zip").write_bytes(b"PK")
    for path in (root / "ml-1m").iterdir():
        path.unlink()
    (root / "ml-1m").rmdir()
    with pytest.raises(DataError, match="SHA-256 checksum"):
        read(root, download=True)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> tuple[Path, synthetic_movielens.SyntheticRatings]:
    folder = tmp_path_factory.mktemp("synthetic")
    example = synthetic_movielens.make(150, 120, 6_000, seed=3)
    synthetic_movielens.write(folder, example, seed=3)
    return folder, example


@pytest.mark.parametrize("split", ["random", "per-user", "time", "cold-films"])
def test_each_rating_is_in_one_part_by_seed(synthetic, split):
    folder, _ = synthetic
    first, again, other = (ML1MDataset(folder, split=split, seed=seed) for seed in (0, 0, 1))
    parts = [first.train, first.validation, first.test]
    together = np.concatenate([part.pairs for part in parts])
    assert len(np.unique(together, axis=0)) == len(together) == 6_000
    for part, same in zip(parts, (again.train, again.validation, again.test), strict=True):
        assert np.array_equal(part.pairs, same.pairs)
    assert (split == "time") == (
        len(first.test) == len(other.test) and np.array_equal(first.test.pairs, other.test.pairs)
    )
    assert [len(part) / 6_000 for part in parts] == pytest.approx([0.8, 0.1, 0.1], abs=0.05)


def test_per_user_and_time_split_the_ratings_of_each_user(synthetic):
    folder, _ = synthetic
    for split in ("per-user", "time"):
        data = ML1MDataset(folder, split=split)
        counts = [np.bincount(part.users, minlength=150) for part in (data.train, data.validation, data.test)]
        whole = sum(counts)
        assert (counts[1] == np.rint(whole * 0.1)).all()
        assert (counts[2] == np.rint(whole * 0.1)).all()
    for user in range(150):
        times = [part.times[part.users == user] for part in (data.train, data.validation, data.test)]
        assert times[0].max() < times[1].min() <= times[1].max() < times[2].min()


def test_users_with_fewer_than_three_ratings_stay_in_training(tmp_path):
    folder = write_files(tmp_path, ratings=[*RATINGS[:5], *RATINGS[6:]])
    data = ML1MDataset(folder, split="time")
    counts = [np.bincount(part.users, minlength=3).tolist() for part in (data.train, data.validation, data.test)]
    assert counts == [[2, 1, 1], [0, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("ratio", [(0.1, 0.45, 0.45), (0.1, 0.1, 0.8), (0.1, 0.8, 0.1)])
def test_users_with_three_ratings_have_some_in_each_part(tmp_path, ratio):
    films = [f"{film}::Film {film}::Drama" for film in range(1, 9)]
    rated = [f"{user}::{film}::3::{film}" for user, count in ((3, 3), (7, 4), (12, 8)) for film in range(1, count + 1)]
    folder = write_files(tmp_path, films=films, ratings=rated)
    for split in ("per-user", "time"):
        data = ML1MDataset(folder, ratio, split)
        for part in (data.train, data.validation, data.test):
            assert set(part.users.tolist()) == {0, 1, 2}


def test_cold_films_have_no_rating_in_training(synthetic):
    data = ML1MDataset(synthetic[0], split="cold-films")
    films = [set(part.items.tolist()) for part in (data.train, data.validation, data.test)]
    assert not films[0] & films[1]
    assert not films[2] & (films[0] | films[1])


def test_invalid_splits_are_an_error(tmp_path, synthetic):
    for ratio in ([0.8, 0.2], [0.8, 0.2, 0.0], [0.8, 0.1, 0.2]):
        with pytest.raises(
            ConfigError, match=r"split_ratio=\[0.8, .* must be the shares of training, validation and test"
        ):
            ML1MDataset(synthetic[0], split_ratio=ratio)
    with pytest.raises(ConfigError, match="split='user' is not valid: it must be one of random, per-user"):
        ML1MDataset(synthetic[0], split="user")
    with pytest.raises(DataError, match=r"the validation part is empty: the split 'random' of 2 ratings"):
        ML1MDataset(write_files(tmp_path, ratings=RATINGS[:2]))


def test_seen_lists_the_films_of_each_user_in_order(synthetic):
    data = ML1MDataset(synthetic[0])
    seen = data.seen("train", "validation")
    assert isinstance(seen, SeenItems)
    for user in range(data.n_users):
        known = {*data.train.items[data.train.users == user], *data.validation.items[data.validation.users == user]}
        assert seen.items_of(user).tolist() == sorted(known)
    assert len(data.seen().indices) == len(data.train)


def test_synthetic_files_hold_the_synthetic_ratings(synthetic):
    folder, example = synthetic
    data = ML1MDataset(folder)
    rated = {tuple(pair) for part in (data.train, data.validation, data.test) for pair in part.pairs.tolist()}
    assert rated == set(zip(example.users.tolist(), example.items.tolist(), strict=True))
    assert np.bincount(example.users).min() >= 20
    assert tuple(data.titles) == example.titles
    assert data.item_texts[5] == f"{', '.join(example.genres[5])}\n{example.titles[5]}"
    assert len(data.item_ids) < data.item_ids[-1]  # numbers have gaps
    watched = np.zeros(example.utility.shape, dtype=bool)
    watched[example.users, example.items] = True
    assert example.utility[watched].mean() > example.utility[~watched].mean() + 1
    again = synthetic_movielens.make(150, 120, 6_000, seed=3)
    assert np.array_equal(again.items, example.items)


def test_synthetic_texts_determine_tastes(synthetic):
    """Users of one gender, age and occupation have similar utilities."""
    example = synthetic[1]
    close = np.corrcoef(example.utility - example.utility.mean(0))
    same = (example.occupations[:, None] == example.occupations) & (example.ages[:, None] == example.ages)
    same &= (example.genders[:, None] == example.genders) & ~np.eye(150, dtype=bool)
    assert close[same].mean() > close[~same].mean() + 0.3


def test_invalid_synthetic_sizes_are_an_error():
    with pytest.raises(ConfigError, match=r"ratings from 20 a user to half of all pairs, 200 to 500"):
        synthetic_movielens.make(10, 100, 600)
