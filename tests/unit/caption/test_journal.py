"""The journal of a captioning run."""

from lib.caption.journal import Journal, Row


def test_a_journal_survives_an_incomplete_line(tmp_path):
    journal = Journal(tmp_path / "captions.jsonl")
    journal.add([Row(file_name="a", status="captioned", caption="x"), Row(file_name="b", status="failed")])
    journal.close()
    journal.path.write_bytes(journal.path.read_bytes() + b'{"file_name": "c", "sta')
    assert list(journal.read()) == ["a", "b"]
    journal.add([Row(file_name="d", status="captioned", caption="half \ud83d")])
    assert list(journal.read()) == ["a", "b", "d"]
    journal.rewrite(row for row in journal.read().values() if row.status == "captioned")
    assert list(Journal(journal.path).read()) == ["a", "d"]
    journal.rewrite(())
    assert list(tmp_path.iterdir()) == []
