"""What the test files share: synthetic digits, cells, numbers in print and in CSVs."""

import csv
import re

import pytest
from digits import write_digits
from extract import CODE

NUMBER = r"-?\d+(?:\.\d+)?"


@pytest.fixture(scope="session")
def mnist(tmp_path_factory):
    """Synthetic digits in place of MNIST: see write_digits."""
    return write_digits(tmp_path_factory.mktemp("data"))


def through(name):
    """The notebook's code cells up to the one with this id, which is the last."""
    names = [*CODE]
    return names[: names.index(name) + 1]


def read_results(path):
    """The rows of results.csv or seeds.csv: {seed: {key: {column: number}}}."""
    seeds = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            rows = seeds.setdefault(row.pop("seed", None), {})
            key = row.pop("model"), int(row.pop("epoch")), row.pop("z_from")
            assert key not in rows
            rows[key] = {name: float(row[name]) for name in row}
    return seeds


def close(value, printed, units=0.501):
    """Whether a number was printed so, rounded; or so many units of its last place."""
    return abs(value - float(printed)) <= units / 10 ** len(printed.partition(".")[2])


def prints(text, values):
    """Whether a text has these numbers, in any order, and no others."""
    words = sorted(re.findall(NUMBER, text), key=float)
    return len(words) == len(values) and all(map(close, sorted(values), words))


def check_tables(text, results):
    """Every printed row is a row of results that its label can mean; returns the keys."""
    found, columns = [], []
    for line in text.splitlines():
        words = line.split()
        if words and {*words} <= {*next(iter(results.values()))}:
            columns = words
        elif values := re.search(
            rf"(?: +{NUMBER} ?[^\d\s]*){{{len(columns) or 99}}}$", line
        ):
            label = {*re.split(r"[ ,]+", line[: values.start()].strip())} - {"epoch"}
            shown = dict(zip(columns, re.findall(f" ({NUMBER})", values[0])))
            keys = [
                key
                for key, row in results.items()
                if label <= {*" ".join(map(str, key)).split()}
                and all(close(row[column], n) for column, n in shown.items())
            ]
            assert keys, line
            found.append(keys[0])
    return found
