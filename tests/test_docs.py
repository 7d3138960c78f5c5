"""The code in the documentation runs as it is printed, with smaller numbers."""

import re
from pathlib import Path

import numpy as np

from ddsm_tf.models import DiffusionModel
from ddsm_tf.noise import NoiseTable

DOCS = Path(__file__).parent.parent / "docs"
SMALLER = {"1000, 50)": "1000, 4)", "segments=10": "segments=3", "512": "8"}
SMALLER |= {"population=16": "population=4", "children=8": "children=2"}
SMALLER |= {"max_trials=60": "max_trials=7"}


def test_the_search_in_a_user_s_own_code(tiny_unet, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "search.md").read_text(), re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20
    for printed, smaller in SMALLER.items():
        assert printed in code
        code = code.replace(printed, smaller)
    monkeypatch.chdir(tmp_path)
    seen = []

    def my_metric(images):
        seen.append(images.shape)
        return 1.0 + float(np.mean(images))

    model = DiffusionModel(tiny_unet, NoiseTable.linear(1000))
    given = {"unet": tiny_unet, "model": model, "my_metric": my_metric}
    exec(compile(code, "search.md", "exec"), dict(given))
    assert seen == [(8, 8, 8, 1)] * 7
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(re.match(r"[\d.]+ \d+ steps at ", line) for line in lines)
    # It goes on where it stopped: nothing is left to try.
    exec(compile(code, "search.md", "exec"), dict(given))
    assert len(seen) == 7
