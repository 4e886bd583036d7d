"""Other notebooks: what the grading sheet says of a submission, right and wrong."""

import json
import re
import subprocess
import sys

from conftest import LINES, ROOT

SUBMISSION = ROOT / "tests" / "submission.ipynb"
MISTAKES = {  # what is written, what a student may write
    ".view(-1) for image, _ in data]).round()": ".view(-1) for image, _ in data])",
    "torch.sigmoid(self.fc22(h))": "torch.exp(self.fc22(h) / 2)",
    "Linear(latent + 10,": "Linear(latent,",
    "self.fc3(torch.cat([z, y], 1))": "self.fc3(z)",
    'x, reduction="sum")': "x) * len(x)",
    "kl = 0.5 *": "kl =",
}
WORDS = {
    "S3.2": "values, expected 0 and 1 (rounded) only",
    "S4.1": "standard deviation of z: found exp of one half (a log variance), expected",
    "S4.2": "expected [(50, 256), (256, 784)] among them",
    "S5.1": "cross-entropy of the batch, nats per image, is",
    "S5.2": "KL of the batch, nats per image, is",
}


def sheet_of(path, *files):
    """Grade a notebook: the exit status, and line -> what the sheet says."""
    command = [sys.executable, "-m", "pytest", "-k", "test_S", "--notebook", path]
    command += ["-p", "no:cacheprovider", *(ROOT / "tests" / file for file in files)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, dict(re.findall(r"(?m)^(S\d\.\d): (.*)$", done.stdout))


def test_a_submission_in_another_style_is_met():
    status, sheet = sheet_of(SUBMISSION, "test_model.py", "test_notebook.py")
    assert status == 0
    assert [sheet[line] for line in LINES[:-2]] == ["met"] * 15, sheet
    assert all(sheet[line].startswith("not graded") for line in LINES[-2:])


def test_usual_mistakes_are_said_in_words(tmp_path):
    text = SUBMISSION.read_text("utf-8")
    for right, wrong in MISTAKES.items():
        right, wrong = (json.dumps(code)[1:-1] for code in (right, wrong))
        assert right in text
        text = text.replace(right, wrong)
    path = tmp_path / "submission.ipynb"
    path.write_text(text, "utf-8")
    _, sheet = sheet_of(path, "test_model.py")
    assert {k for k, v in sheet.items() if v.startswith("NOT MET")} == {*WORDS}, sheet
    assert all(words in sheet[line] for line, words in WORDS.items()), sheet
