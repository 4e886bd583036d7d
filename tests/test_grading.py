"""Other notebooks: what the grading sheet says of a submission, right and wrong."""

import json
import re
import subprocess
import sys

from conftest import LINES, ROOT

SUBMISSION = ROOT / "tests" / "submission.ipynb"
MISTAKES = {  # by the file that finds them: what is written, what a student may write
    "test_model.py": {
        ".view(-1) for image, _ in data]).round()": ".view(-1) for image, _ in data])",
        "torch.sigmoid(self.fc22(h))": "torch.exp(self.fc22(h) / 2)",
        "Linear(latent + 10,": "Linear(latent,",
        "self.fc3(torch.cat([z, y], 1))": "self.fc3(z)",
        'x, reduction="sum")': "x) * len(x)",
        "kl = 0.5 *": "kl =",
    },
    "test_notebook.py": {
        "optimizer.zero_grad()": "pass",
        "lr=LEARNING_RATE": "lr=LEARNING_RATE, weight_decay=1e-5",
        "plt.plot(losses)": "plt.plot(losses[::5])",
        "images.view(": "images[[*range(99), 0]].view(",
    },
}
WORDS = {
    "S1.1": "off the negative bound's gradient",
    "S3.2": "values, expected 0 and 1 (rounded) only",
    "S4.1": "standard deviation of z: found exp of one half (a log variance), expected",
    "S4.2": "expected [(50, 256), (256, 784)] among them",
    "S5.1": "cross-entropy of the batch, nats per image, is",
    "S5.2": "KL of the batch, nats per image, is",
    "S5.3": "away from Adam's",
    "S6.1": "no line shows the loss of each of the 55 iterations",
    "S6.2": "shows 9 samples of 9, expected 10",
}


def sheet_of(path, *files):
    """Grade a notebook: the exit status, and line -> what the sheet says."""
    command = [sys.executable, "-m", "pytest", "-k", "test_S", "--notebook", path]
    command += [ROOT / "tests" / file for file in files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, dict(re.findall(r"(?m)^(S\d\.\d): (.*)$", done.stdout))


def test_a_submission_in_another_style_is_met():
    status, sheet = sheet_of(SUBMISSION, "test_model.py", "test_notebook.py")
    assert status == 0
    assert [sheet[line] for line in LINES[:-2]] == ["met"] * 15, sheet
    assert all(sheet[line].startswith("not graded") for line in LINES[-2:])


def test_usual_mistakes_are_said_in_words(tmp_path):
    found = {}
    for file, mistakes in MISTAKES.items():
        text = SUBMISSION.read_text("utf-8")
        for right, wrong in mistakes.items():
            right, wrong = (json.dumps(code)[1:-1] for code in (right, wrong))
            assert right in text
            text = text.replace(right, wrong)
        path = tmp_path / "submission.ipynb"
        path.write_text(text, "utf-8")
        _, sheet = sheet_of(path, file)
        found |= {line: said for line, said in sheet.items() if "NOT MET" in said}
    assert {*found} == {*WORDS}, found
    assert all(words in found[line] for line, words in WORDS.items()), found
