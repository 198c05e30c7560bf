"""Freely generated answers: beside teacher-forced ones in a report, and judged by a stub of a language model."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from corrigenda.pipeline.judge import PROMPT
from tests.samples import QUIET

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning.*")


@pytest.fixture
def stub():
    """An endpoint whose ``reply`` decides on what it is asked; ``asked`` holds the bodies of requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, body, self.headers.get("Authorization")))
            if server.reply is None:
                self.send_error(429)
                return
            text = server.reply(body["messages"][0]["content"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

        def log_message(self, *_):
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.reply = [], lambda prompt: "Correct."
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(corrigenda, tiny_folder, data_files, tmp_path):
    """A validation of five cases with freely generated answers."""
    command = [
        "validate", "--model", "EditingModule", "--model.lm.name", tiny_folder("gpt2"),
        "--model.generate_tokens", "5", "--data", "CounterFact", "--data.path", data_files.counterfact,
        "--edit.editor", "FT", "--edit.editor.layers", "[1]", "--edit.editor.steps", "8", *QUIET,
    ]  # fmt: skip
    assert corrigenda(*command, "--run_dir", "run") == 0
    return tmp_path / "run"


def probes(run):
    rows = [json.loads(line) for line in (run / "cases.jsonl").read_text().splitlines()]
    return [probe for row in rows for probe in row["probes"]]


def table(corrigenda, run, out):
    """{criterion: {column: cell}} of the table of teacher-forced and free answers."""
    assert corrigenda("report", run, "--out", out) == 0
    lines = (run.parent / out / "report.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("## Teacher-forced and free answers")
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in lines[start:][:12]
        if line.startswith("| ")
    ]
    header, _, *cells = rows
    return {row[1]: dict(zip(header[2:], row[2:], strict=True)) for row in cells}


def test_free_answers_are_kept_and_end_at_a_line_break(run):
    texts = [probe["answer"] for probe in probes(run)]
    assert texts and not any("\n" in text for text in texts)
    assert any(text != probe["prediction"] for text, probe in zip(texts, probes(run), strict=True))
    assert {"exact", "wild_exact", "wild_contains"} <= probes(run)[0].keys()


def test_teacher_forced_and_free_answers_stand_side_by_side(corrigenda, run):
    found = table(corrigenda, run, "report")
    assert list(found)[:2] == ["efficacy", "generality"]
    assert list(found["efficacy"]) == ["exact, teacher-forced", "exact, free", "contained, free"]
    of_efficacy = [probe for probe in probes(run) if probe["criterion"] == "efficacy"]
    for name, column in (("exact", "exact, teacher-forced"), ("wild_contains", "contained, free")):
        mean = 100 * sum(probe[name] for probe in of_efficacy) / len(of_efficacy)
        assert found["efficacy"][column].startswith(f"{mean:.1f}")


def test_a_judge_reads_question_gold_and_answer_once(corrigenda, run, stub, capsys, monkeypatch):
    stub.reply = lambda prompt: "correct" if "Question: Neighbour" not in prompt else "Incorrect!"
    monkeypatch.setenv("JUDGE", "secret")
    command = ["judge", run, "--url", stub.url, "--model", "wise", "--key_from", "JUDGE"]
    assert corrigenda(*command) == 0, capsys.readouterr().err
    wanted = {(p["prompt"], p["target"], p["answer"]) for p in probes(run)}
    assert len(stub.asked) == len(wanted)
    path, body, key = stub.asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["temperature"] == 0 and body["model"] == "wise"
    first = probes(run)[0]
    text = PROMPT.format(question=first["prompt"], gold=first["target"], said=first["answer"])
    assert body["messages"] == [{"role": "user", "content": text}]
    rows = [json.loads(line) for line in (run / "judged.jsonl").read_text().splitlines()]
    assert rows[0]["prompt"] == text and rows[0]["reply"] == "correct" and rows[0]["correct"]
    assert "secret" not in (run / "judged.jsonl").read_text()
    assert corrigenda(*command) == 0 and len(stub.asked) == len(wanted)  # nothing is asked again
    assert (
        f"{sum(row['correct'] for row in rows)} of {len(rows)} answers correct"
        in capsys.readouterr().out
    )
    found = table(corrigenda, run, "report")
    assert found["efficacy"]["judged correct, free"].startswith("100.0")
    assert not found["locality"]["judged correct, free"].startswith("100.0")


def test_a_judge_that_stops_responding_loses_no_verdict(corrigenda, run, stub, capsys):
    def reply(prompt):
        if len(stub.asked) == 4:
            stub.reply = None
        return "who knows"

    stub.reply = reply
    command = ["judge", run, "--url", stub.url, "--model", "wise"]
    assert corrigenda(*command) == 2
    assert "refuses: 429" in capsys.readouterr().err
    assert len((run / "judged.jsonl").read_text().splitlines()) == 4
    stub.reply = lambda prompt: "correct"
    assert corrigenda(*command) == 0
    assert "4 replies unclear" in capsys.readouterr().out
    assert len(stub.asked) == 1 + len((run / "judged.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--url", "ftp://judge"], "http://"),
        (["--url", "http://127.0.0.1:9/v1"], "does not respond"),
        (["--url", "http://127.0.0.1:9", "--key_from", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
        (["--url", "http://127.0.0.1:9", "--timeout", "0"], "timeout"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_named(corrigenda, run, options, says, capsys):
    assert corrigenda("judge", run, "--model", "wise", *options) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (run / "judged.jsonl").exists()
