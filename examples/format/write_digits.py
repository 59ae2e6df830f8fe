"""Writes scikit-learn's digits as data of the format in my_formats.py, into a folder `digits` beside this file."""

import csv
from pathlib import Path

from sklearn.datasets import load_digits


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "split"])
        for row, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            (folder / f"{row:04}.pgm").write_bytes(b"P5 8 8 16\n" + image.astype("uint8").tobytes())
            table.writerow([f"{row:04}.pgm", label, "test" if row % 6 == 0 else "train"])


if __name__ == "__main__":
    write(Path(__file__).parent / "digits")
