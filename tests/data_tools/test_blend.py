import json

import numpy as np
import pytest

from megamm.data.blend import open_reader
from megamm.data.indexed import Writer
from megamm.errors import DataError


@pytest.fixture
def blend(load_script):
    return load_script("blend")


@pytest.fixture
def datasets(tmp_path):
    """Two of 10 and 4 samples, of 5 tokens each."""
    for name, num in (("a", 10), ("b", 4)):
        with Writer(tmp_path / name) as writer:
            for _ in range(num):
                writer.add(np.arange(5, dtype=np.int32), [], np.array([[3, 5]], np.int32))
            writer.finish({"family": "llava"})
    return str(tmp_path / "a"), str(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, [10, 4]),
        ({"weights": (0.5, 0.5)}, [4, 4]),
        ({"weights": (3, 1), "samples": 22}, [17, 5]),
        ({"tokens": (26, 40)}, [6, 8]),
    ],
)
def test_counts_are_exact_and_printed(options, counts, blend, datasets, tmp_path, capsys):
    blend.main(blend.Options(datasets=datasets, output=tmp_path / "mix", **options))
    total = 5 * sum(counts)
    assert capsys.readouterr().out.splitlines() == [
        *(
            f"{prefix}: {count} samples of {size}, {5 * count} tokens ({5 * count / total:.2%})"
            for prefix, count, size in zip(datasets, counts, (10, 4), strict=True)
        ),
        f"{tmp_path / 'mix'}: {sum(counts)} samples, {total} tokens",
    ]
    assert open_reader(tmp_path / "mix").counts == counts
    assert [member["samples"] for member in json.loads((tmp_path / "mix.json").read_text())["blend"]] == counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1,)}, "--weights: 1 numbers for 2 datasets"),
        ({"tokens": (1, 2, 3)}, "--tokens: 3 numbers for 2 datasets"),
        ({"tokens": (1, 2), "weights": (1, 2)}, "give one of them"),
        ({"samples": 3}, "--samples: 3; give"),
        ({"weights": (1, 1), "samples": 0}, "--samples: 0; give"),
        ({"image_tokens": 0}, "--image-tokens"),
        ({"tokens": (-1, 2)}, "--tokens: -1"),
    ],
)
def test_bad_options(options, message, blend, datasets, tmp_path):
    with pytest.raises(DataError, match=message):
        blend.main(blend.Options(datasets=datasets, output=tmp_path / "mix", **options))
    assert not (tmp_path / "mix.json").exists()


def test_no_dataset(blend, tmp_path):
    with pytest.raises(DataError, match="no dataset to blend"):
        blend.main(blend.Options(datasets=(), output=tmp_path / "mix"))
