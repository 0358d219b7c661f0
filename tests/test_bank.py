"""Banks: what is written, read back and refused, and what is left when the writer is killed or the disk is full."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from full_disk import files_up_to
from safetensors import safe_open
from safetensors.torch import load_file, save
from small_prompts import K, assert_same, edit_json, make, numbers, tiny_ref
from tiny_llm import HIDDEN_SIZE

from softprompt_registry.errors import ArtifactError, BaseModelMismatch
from softprompt_registry.soft_prompts.bank import BankWriter, SoftPromptBank
from softprompt_registry.soft_prompts.bank_files import HEADER_BYTES
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt

ROW_BYTES = K * HIDDEN_SIZE * 4
ONE_SHARD = ["bank.json", "bank.sqlite", "embeddings-00000.safetensors", "initial_embeddings-00000.safetensors"]


def written(
    folder: Path, members: dict[int, SoftPrompt], *, rows_per_shard: int = 3, failed: dict[int, str] | None = None
) -> SoftPromptBank:
    """A bank whose members are added in the order of the dict."""
    with BankWriter(folder, rows_per_shard=rows_per_shard) as writer:
        for position, member in members.items():
            writer.add(position, member)
        for position, task in (failed or {}).items():
            writer.fail(position, task, "its train loss became nan in epoch 1")
        writer.finish(None)
    return SoftPromptBank(folder)


def many(count: int) -> dict[int, SoftPrompt]:
    return {position: make(f"t{position}", position) for position in range(count)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_holds(bank: SoftPromptBank, members: dict[int, SoftPrompt]) -> None:
    expected = [members[position] for position in sorted(members)]
    assert bank.tasks() == [member.record.task for member in expected]
    for found, member in zip(bank, expected, strict=True):
        assert_same(found, member)


# What is written ------------------------------------------------------------------------------------------------------


def test_a_bank_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    members = [make(name, seed) for seed, name in enumerate(["moods", "ärger / wut", "rooms"])]
    saved = SoftPromptBank.save(members, tmp_path / "bank", made_from="abc")
    loaded = SoftPromptBank(tmp_path / "bank")
    assert len(loaded) == 3
    assert_holds(loaded, dict(enumerate(members)))
    assert_same(loaded.member("ärger / wut"), members[1])
    assert (loaded.digest, loaded.dod_digest) == (saved.digest, "cd" * 32)
    assert loaded.header["made_from"] == "abc" and loaded.base_model == tiny_ref()
    assert (loaded.header["K"], loaded.header["D"], loaded.header["num_soft_prompts"]) == (K, HIDDEN_SIZE, 3)
    assert [record["task"] for record in loaded.records()] == loaded.tasks()
    assert loaded.record("rooms") == members[2].record.to_json()
    assert names(tmp_path / "bank") == ONE_SHARD == sorted(loaded.files)


def test_the_digest_is_of_names_and_numbers(tmp_path: Path) -> None:
    def digest(name: str, *members: SoftPrompt) -> str:
        return SoftPromptBank.save(members, tmp_path / name).digest

    first = digest("a", make("x", 0), make("y", 1))
    assert digest("b", make("x", 0, metrics={}), make("y", 1, tuning={})) == first
    assert len({first, digest("c", make("x", 0), make("z", 1)), digest("d", make("x", 0), make("y", 2))}) == 3


def test_members_stand_at_their_positions_whatever_the_order_they_came_in(tmp_path: Path) -> None:
    members = many(7)
    in_order = written(tmp_path / "a", members)
    shuffled = written(tmp_path / "b", {position: members[position] for position in (5, 0, 6, 3, 1, 4, 2)})
    assert_holds(shuffled, members)
    assert shuffled.digest == in_order.digest


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7])
def test_every_shard_is_a_plain_safetensors_file(tmp_path: Path, count: int) -> None:
    bank = written(tmp_path, many(count))
    shards = sorted(tmp_path.glob("embeddings-*"))
    found = [load_file(path)["embeddings"] for path in shards]
    assert [tensor.shape[0] for tensor in found] == [3] * (count // 3) + [count % 3] * (count % 3 > 0)
    assert torch.equal(torch.cat(found), torch.stack([numbers(seed) for seed in range(count)]))
    for path in shards:
        with safe_open(path, framework="pt") as file:
            assert list(file.keys()) == ["embeddings"]
            assert file.metadata() == {"format": "softprompt-bank", "base_fingerprint": tiny_ref().fingerprint}
    assert bank.header["rows_per_shard"] == 3
    assert sorted(bank.files) == names(tmp_path)


def test_a_shared_start_is_stored_once_and_own_ones_each(tmp_path: Path) -> None:
    start = make().initial_embeddings
    members = many(3) | {3: make("alone", 3, initial=False), 4: replace(make("own", 4), initial_embeddings=numbers(50))}
    bank = written(tmp_path, members, rows_per_shard=8)
    stored = load_file(tmp_path / "initial_embeddings-00000.safetensors")["initial_embeddings"]
    assert start is not None and torch.equal(stored, torch.stack([start, numbers(50)]))
    assert_holds(bank, members)
    assert bank.member("alone").initial_embeddings is None


def test_a_bank_without_starts_has_no_file_of_them(tmp_path: Path) -> None:
    bank = SoftPromptBank.save([make("a", initial=False)], tmp_path / "bank")
    assert names(tmp_path / "bank") == ONE_SHARD[:3] == sorted(bank.files)


def test_texts_with_exotic_line_ends_come_back(tmp_path: Path) -> None:
    odd = "one\u2028two\u2029three\x85four\x0cfive\nsix\0seven"
    member = make("odd\u2028task", ground_truth=odd, labels=(odd, "plain"))
    bank = SoftPromptBank.save([member, make("even", 1)], tmp_path / "bank")
    assert_same(bank.member("odd\u2028task"), member)
    assert SoftPromptBank(tmp_path / "bank").tasks() == ["odd\u2028task", "even"]


# Reading --------------------------------------------------------------------------------------------------------------


def test_a_member_is_read_without_the_rows_of_the_others(tmp_path: Path) -> None:
    """The others are overwritten with NaN, which no soft prompt may hold, and their shards removed."""
    members = {i: replace(member, initial_embeddings=numbers(50 + i)) for i, member in many(7).items()}
    bank = written(tmp_path, members)
    for kind in ("embeddings", "initial_embeddings"):
        path = tmp_path / f"{kind}-00001.safetensors"  # t3, t4, t5
        start = 8 + HEADER_BYTES + ROW_BYTES
        content = path.read_bytes()
        nan = b"\xff" * ROW_BYTES
        path.write_bytes(content[: start - ROW_BYTES] + nan + content[start : start + ROW_BYTES] + nan)
        (tmp_path / f"{kind}-00000.safetensors").unlink()
        (tmp_path / f"{kind}-00002.safetensors").write_bytes(b"garbage")
    from softprompt_registry.registry.artifacts import find_soft_prompts

    assert_same(bank.member("t4"), members[4])
    (found,) = find_soft_prompts(f"{tmp_path}#t4")
    assert_same(found, members[4])
    with pytest.raises(ArtifactError, match="soft prompt 't5': its embeddings hold NaN"):
        bank.member("t5")
    for task in ("t0", "t6"):
        with pytest.raises(ArtifactError, match=r"embeddings-0000[02].safetensors cannot be read .*Make it again"):
            bank.member(task)


def test_a_member_does_not_hold_its_shard_in_memory(tmp_path: Path) -> None:
    """Bug: a member was a view of the whole file, so that thousands of them used up the address space."""
    members = list(written(tmp_path, many(3)))
    for member in members:
        assert member.embeddings.untyped_storage().nbytes() == ROW_BYTES
    assert members[0].initial_embeddings is members[2].initial_embeddings
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_records_are_read_without_any_tensor(tmp_path: Path) -> None:
    SoftPromptBank.save([make("a")], tmp_path / "bank")
    (tmp_path / "bank" / "embeddings-00000.safetensors").unlink()
    assert SoftPromptBank(tmp_path / "bank").record("a")["labels"] == ["joy", "fear"]


def test_a_bank_in_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "bank # 1? %41"
    members = many(4)
    written(folder, members, failed={4: "lost"})
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for path in before:
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        bank = SoftPromptBank(folder)
        assert_holds(bank, members)
        assert list(bank.failures()) == ["lost"]
        assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    finally:
        folder.chmod(0o755)


def test_an_unknown_member_lists_the_known_ones(tmp_path: Path) -> None:
    bank = written(tmp_path / "bank", many(10), rows_per_shard=256)
    with pytest.raises(ArtifactError) as caught:
        bank.member("task99")
    assert "reading 'task99' of bank 'bank': it has no such member among its 10 (t0, t1" in str(caught.value)
    assert "t7, …). Correct the part after '#'" in str(caught.value) and "t8" not in str(caught.value)


def test_failed_tasks_are_listed_and_named(tmp_path: Path) -> None:
    bank = written(tmp_path / "bank", {0: make("a"), 2: make("c", 1)}, failed={3: "d", 1: "b"})
    reason = "its train loss became nan in epoch 1"
    assert list(bank.failures().items()) == [("b", reason), ("d", reason)]
    assert (bank.tasks(), len(bank), bank.header["num_failed"]) == (["a", "c"], 2, 2)
    with pytest.raises(ArtifactError) as caught:
        bank.member("b")
    assert f"reading 'b' of bank 'bank': that task could not be tuned: {reason}. Tune it with" in str(caught.value)
    assert "take one of the 2 (a, c)" in str(caught.value)


def test_a_bank_of_version_1_is_read(tmp_path: Path) -> None:
    bank = SoftPromptBank(Path(__file__).parent / "data" / "v1" / "bank")
    assert bank.tasks() == ["colours", "sizes"] and len(bank) == 2
    assert [record["labels"] for record in bank.records()] == [["red", "blue"], ["big", "small"]]
    members = list(bank)
    assert [member.record.task for member in members] == bank.tasks()
    assert_same(bank.member("sizes"), members[1])
    assert members[0].initial_embeddings is not None and bank.failures() == {}
    assert sorted(bank.files) == names(bank.folder)
    with pytest.raises(ArtifactError, match=r"no such member among its 2 \(colours, sizes\)"):
        bank.member("moods")
    # The same members in today's format are the same bank to whoever was made from it.
    again = SoftPromptBank.save(bank, tmp_path / "bank")
    assert again.header["format_version"] == 2 and again.digest == bank.digest
    assert list(again.records()) == list(bank.records())
    for found, expected in zip(again, bank, strict=True):
        assert_same(found, expected)


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_one_bank_is_refused(tmp_path: Path) -> None:
    def refused(*members: SoftPrompt) -> str:
        with pytest.raises(ArtifactError) as caught:
            SoftPromptBank.save(members, tmp_path / "bank")
        assert list(tmp_path.iterdir()) == []
        return str(caught.value)

    assert "there are no soft prompts to write (none were given)" in refused()
    assert "the task 'a' occurs twice" in refused(make("a", 0), make("b", 1), make("a", 2))
    short = SoftPrompt(numbers(0, 3), None, make("b").record)
    assert "'b' has K=3, 'a' has K=4; one bank has one K" in refused(make("a"), short)
    other = tiny_ref(1, "elsewhere")
    with pytest.raises(BaseModelMismatch) as caught:
        SoftPromptBank.save([make("a"), make("b", base_model=other)], tmp_path / "bank")
    for name, ref in (("'a'", tiny_ref()), ("'b'", other)):
        assert f"soft prompt {name} belongs to" in str(caught.value)
        assert str(ref) in str(caught.value)


def test_failures_alone_are_no_bank(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no soft prompts to write \('a': its train loss became nan in epoch 1\)"):
        written(tmp_path, {}, failed={0: "a"})
    assert not (tmp_path / "bank.json").exists()


def rewritten_index(*statements: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "bank.sqlite")) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()

    return damage


def replaced_file(name: str, content: bytes | None) -> Callable[[Path], object]:
    """The file without its last bytes, or with other content."""
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[:-40] if content is None else content
    )


SHARD, START = "embeddings-00000.safetensors", "initial_embeddings-00000.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no shard": (lambda folder: (folder / SHARD).unlink(), "embeddings-00000.safetensors cannot be read"),
    "cut shard": (replaced_file(SHARD, None), "embeddings-00000.safetensors cannot be read"),
    "shard without its header": (replaced_file(SHARD, bytes(5000)), "embeddings-00000.safetensors cannot be read"),
    "other tensor": (
        replaced_file(SHARD, save({"other": torch.zeros(1)})),
        r"tensors \['other'\], expected one called",
    ),
    "fewer rows": (
        replaced_file(SHARD, save({"embeddings": torch.zeros(1, K, HIDDEN_SIZE)})),
        "embeddings-00000.safetensors cannot be read",
    ),
    "other D": (replaced_file(SHARD, save({"embeddings": torch.zeros(2, K, 7)})), r"shape \(4, 7\); expected \(K, D\)"),
    "no start": (lambda folder: (folder / START).unlink(), "initial_embeddings-00000.safetensors cannot be read"),
    "start of other name": (
        replaced_file(START, save({"other": torch.zeros(1)})),
        "initial_embeddings-00000.safetensors cannot be read",
    ),
    "no index": (lambda folder: (folder / "bank.sqlite").unlink(), "bank.sqlite cannot be read .*Make it again"),
    "empty index": (replaced_file("bank.sqlite", b""), "bank.sqlite cannot be read .*no such table"),
    "index of text": (replaced_file("bank.sqlite", b"text " * 2000), "bank.sqlite cannot be read .*not a database"),
    "cut index": (
        lambda folder: os.truncate(folder / "bank.sqlite", 5000),
        "bank.sqlite cannot be read .*malformed",
    ),
    "record without JSON": (rewritten_index("UPDATE members SET record = '{'"), "bank.sqlite holds no JSON objects"),
    "record without a template": (
        rewritten_index("UPDATE members SET record = json_remove(record, '$.template')"),
        "its record is incomplete .*template",
    ),
    "member dropped": (rewritten_index("DELETE FROM members WHERE task = 'b'"), r"no such member among its 1 \(a\)"),
    "no header": (lambda folder: (folder / "bank.json").unlink(), "bank.json' is missing"),
    "cut header": (replaced_file("bank.json", None), "bank.json' is not JSON"),
    "header of version 3": (
        lambda folder: edit_json(folder / "bank.json", format_version=4),
        "its format_version is 4; this version of softprompt-registry reads 1 and 2 and 3",
    ),
    **{
        f"header without {key}": (
            lambda folder, key=key: edit_json(folder / "bank.json", **{key: ...}),
            f"its record is incomplete .*{key}",
        )
        for key in ("base_model", "digest", "num_soft_prompts", "rows_per_shard")
    },
    "header of version 1": (
        lambda folder: edit_json(folder / "bank.json", format_version=1),
        "bank.jsonl cannot be read",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_bank_says_what_is_wrong(tmp_path: Path, what: str) -> None:
    damage, message = DAMAGES[what]
    folder = tmp_path / "bank"
    SoftPromptBank.save([make("a"), make("b", 1)], folder)
    damage(folder)
    left = names(folder)
    with pytest.raises(ArtifactError, match=message):
        SoftPromptBank(folder).member("b")
    assert names(folder) == left  # reading makes no file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bank.safetensors", None),
        ("bank.safetensors", b"cut"),
        ("bank.safetensors", save({"other": torch.zeros(1)})),
        ("bank.safetensors", save({"embeddings": torch.zeros(1, 3, HIDDEN_SIZE)})),
        ("bank.jsonl", None),
        ("bank.jsonl", b'{"row": 0'),
        ("bank.jsonl", b"{}\n"),
        ("bank.jsonl", b"[]\n"),
        ("bank.jsonl", b"7\n"),
        ("bank.json", b'{"format_version": 1}'),
    ],
)
def test_a_damaged_bank_of_version_1_says_what_is_wrong(tmp_path: Path, name: str, content: bytes | None) -> None:
    for path in (Path(__file__).parent / "data" / "v1" / "bank").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match="reading bank .*Make it again|found the tensors"):
        SoftPromptBank(tmp_path).member("sizes")


def test_a_missing_shard_is_not_left_out_of_the_files(tmp_path: Path) -> None:
    """Bug: the files were those that were there, so an incomplete bank was logged without a word."""
    bank = written(tmp_path, many(4))
    (tmp_path / "embeddings-00001.safetensors").unlink()
    (tmp_path / "old_embeddings-00000.safetensors").write_bytes(b"")
    assert bank.files == sorted([*ONE_SHARD, "embeddings-00001.safetensors"])


def test_a_failed_save_leaves_the_old_bank(tmp_path: Path) -> None:
    SoftPromptBank.save([make("a")], tmp_path / "bank")
    with pytest.raises(TypeError, match="not JSON serializable"):
        SoftPromptBank.save([make("b", 1, tuning={"what": object()})], tmp_path / "bank")
    assert SoftPromptBank(tmp_path / "bank").tasks() == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


# A bank that grows ----------------------------------------------------------------------------------------------------


def test_a_member_that_is_refused_leaves_no_trace(tmp_path: Path) -> None:
    """Bug: what the first member shares with all was kept in memory only when that member could not be stored."""
    members = many(4)
    with BankWriter(tmp_path, rows_per_shard=3) as writer:
        with pytest.raises(TypeError, match="not JSON serializable"):
            writer.add(0, make("t0", 9, tuning={"what": object()}, base_model=tiny_ref(1)))
        with pytest.raises(ArtifactError, match="hold NaN"):  # found when the numbers are on the disk
            nan = torch.full((K, HIDDEN_SIZE), float("nan"))
            writer.add(0, replace(make("t0", 9), initial_embeddings=nan))
        for position, member in members.items():
            writer.add(position, member)
        with pytest.raises(ArtifactError, match="'t1' occurs twice"):
            writer.add(7, make("t1"))
    with BankWriter(tmp_path) as writer:
        assert writer.done() == {0, 1, 2, 3}
        writer.finish(None)
    assert_holds(SoftPromptBank(tmp_path), members)


def test_a_second_writer_keeps_the_size_of_the_shards(tmp_path: Path) -> None:
    """Bug: it took its own, and read and wrote rows at other places."""
    members = many(8)
    with BankWriter(tmp_path, rows_per_shard=3) as writer:
        for position in range(5):
            writer.add(position, members[position])
    with BankWriter(tmp_path, rows_per_shard=2) as writer:
        for position in range(5, 8):
            writer.add(position, members[position])
        writer.finish(None)
    bank = SoftPromptBank(tmp_path)
    assert_holds(bank, members)
    assert bank.header["rows_per_shard"] == 3


def test_a_bank_that_grows_on_is_none_until_it_is_finished_again(tmp_path: Path) -> None:
    members = many(5)
    first = written(tmp_path, {position: members[position] for position in range(4)})
    with BankWriter(tmp_path) as writer:
        with pytest.raises(ArtifactError, match="bank.json' is missing"):
            SoftPromptBank(tmp_path)
        writer.add(4, members[4])
        writer.finish(None)
    assert_holds(SoftPromptBank(tmp_path), members)
    assert SoftPromptBank(tmp_path).digest != first.digest


def test_what_a_writer_cannot_go_on_with_is_an_artifact_error(tmp_path: Path) -> None:
    def go_on() -> None:
        with BankWriter(tmp_path, rows_per_shard=3) as writer:
            writer.add(4, make("t4", 4))
            writer.finish(None)

    with BankWriter(tmp_path, rows_per_shard=3) as writer:
        for position, member in many(4).items():
            writer.add(position, member)
    shard = tmp_path / "embeddings-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match="embeddings-00001.safetensors should hold 1 rows and is shorter. Remove"):
        go_on()
    shard.unlink()
    with pytest.raises(ArtifactError, match="embeddings-00001.safetensors should hold 1 rows and is missing. Remove"):
        go_on()
    shard.write_bytes(content)
    first = (tmp_path / "embeddings-00000.safetensors").rename(tmp_path / "away")
    with pytest.raises(ArtifactError, match="embeddings-00000.safetensors should hold 3 rows and is missing"):
        go_on()
    first.rename(tmp_path / "embeddings-00000.safetensors")
    with BankWriter(tmp_path) as writer:
        writer.finish(None)
    assert_holds(SoftPromptBank(tmp_path), many(5))
    (tmp_path / "bank.sqlite").write_bytes(b"text " * 2000)
    with pytest.raises(ArtifactError, match="its files cannot be written .*not a database.* Remove that folder"):
        go_on()
    with pytest.raises(ArtifactError, match="its files cannot be written .*Make room on the disk, see that the folder"):
        BankWriter(tmp_path / "embeddings-00000.safetensors")


# Before each of our statements, and where a file would be put on the disk. What a killed process has written the
# kernel keeps, so nothing here waits for the disk.
KILLED_AT_EACH_STEP = """
import os, signal, sys
from pathlib import Path
import small_prompts, test_bank
from softprompt_registry.soft_prompts.bank import BankWriter, SoftPromptBank

members = test_bank.killed_members()
undisturbed = SoftPromptBank(Path(sys.argv[1]))

def write(folder, step=lambda *statement: None):
    with BankWriter(folder, rows_per_shard=2) as writer:
        writer._connection.execute("PRAGMA synchronous = OFF")
        writer._connection.set_trace_callback(step)
        for position in members:
            if position not in writer.done():
                writer.add(position, members[position])
                step()
        writer.fail(9, "lost", "why")
        writer.finish("key")
        step()

def write_and_die(folder, last):
    left = [last]
    def step(*statement):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = step
    write(folder, step)

os.fsync = lambda file: None
number = 0
while True:
    number += 1
    folder = Path(sys.argv[2]) / str(number)
    child = os.fork()
    if not child:
        try:
            write_and_die(folder, number)
        finally:
            os._exit(0)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    if killed:
        write(folder)
    bank = SoftPromptBank(folder)
    assert bank.header == undisturbed.header, number
    test_bank.assert_holds(bank, members)
    assert sorted(bank.files) == test_bank.names(folder) == test_bank.names(undisturbed.folder), number
    if not killed:
        break
print(number)
"""


def killed_members() -> dict[int, SoftPrompt]:
    own = {i: replace(make(f"t{i}", i), initial_embeddings=numbers(50 + i)) for i in (0, 2)}
    return {3: make("t3", 3), 0: own[0], 1: make("t1", 1, initial=False), 2: own[2]}


def run_python(script: str, *arguments: object) -> str:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_writer_killed_at_any_step_can_be_resumed(tmp_path: Path) -> None:
    with BankWriter(tmp_path / "undisturbed", rows_per_shard=2) as writer:
        for position, member in killed_members().items():
            writer.add(position, member)
        writer.fail(9, "lost", "why")
        writer.finish("key")
    assert_holds(SoftPromptBank(tmp_path / "undisturbed"), killed_members())
    (tmp_path / "killed").mkdir()
    steps = int(run_python(KILLED_AT_EACH_STEP, tmp_path / "undisturbed", tmp_path / "killed"))
    assert steps > 60


@pytest.mark.parametrize(
    ("num_virtual_tokens", "num_bytes", "reason"),
    [(K, 120_000, "disk I/O error|full"), (200, 300_000, "File too large")],
    ids=["index", "shard"],
)
def test_a_full_disk_leaves_what_was_added(
    tmp_path: Path, num_virtual_tokens: int, num_bytes: int, reason: str
) -> None:
    members = {
        i: SoftPrompt(numbers(i, num_virtual_tokens), None, make(f"t{i}", initial=False).record) for i in range(12)
    }
    added = 0
    with BankWriter(tmp_path / "full") as writer:
        with pytest.raises(ArtifactError, match=f"({reason}).*Make room on the disk"), files_up_to(num_bytes):
            for position, member in members.items():
                writer.add(position, member)
                added += 1
        assert 3 < added < 12 and writer.done() == set(range(added))
        writer.finish(None)
    assert_holds(SoftPromptBank(tmp_path / "full"), dict(list(members.items())[:added]))
    # There is room again.
    with BankWriter(tmp_path / "full") as writer:
        for position in range(added, 12):
            writer.add(position, members[position])
        with pytest.raises(ArtifactError, match="Make room on the disk"), files_up_to(20_000):
            writer.finish(None)
        with pytest.raises(ArtifactError, match="bank.json' is missing"):
            SoftPromptBank(tmp_path / "full")
    with BankWriter(tmp_path / "full") as writer:
        writer.finish(None)
    assert_holds(SoftPromptBank(tmp_path / "full"), members)


def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="Make room on the disk"), files_up_to(10):
        BankWriter(tmp_path / "bank")
    with pytest.raises(ArtifactError, match="Make room on the disk"), files_up_to(10):
        SoftPromptBank.save([make()], tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert_holds(written(tmp_path / "bank", many(1)), many(1))


MEMORY = """
import os, sys
from pathlib import Path
import torch
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.soft_prompts.bank import BankWriter, SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord

os.fsync = lambda file: None  # a matter of time, not of memory
base = BaseModelRef("any", None, "float32", 256, 1000, 2, "a", "b", "c")
generator = torch.Generator().manual_seed(0)
for count in (200, 2000):
    folder = Path(sys.argv[1]) / str(count)
    with BankWriter(folder) as writer:
        writer._connection.execute("PRAGMA synchronous = OFF")
        for position in range(count):
            numbers, start = torch.randn(2, 20, 256, generator=generator)
            record = SoftPromptRecord(f"t{position}", "generation", base, "{x}", tuning={"train_losses": [1.5] * 20})
            writer.add(position, SoftPrompt(numbers, start, record))
        writer.finish(None)
    bank = SoftPromptBank(folder)
    assert torch.equal(bank.member(f"t{count - 1}").embeddings, numbers)
    # Not getrusage: its peak counts what the parent had when it started this process.
    print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def test_memory_does_not_grow_with_the_number_of_members(tmp_path: Path) -> None:
    few, many_members = (int(peak) / 1024 for peak in run_python(MEMORY, tmp_path).split())
    size = sum(path.stat().st_size for path in (tmp_path / "2000").iterdir())
    assert size > 2 * 2000 * 20 * 256 * 4
    assert many_members - few < 20  # MiB; the files have 80


def test_the_header_of_a_bank(tmp_path: Path) -> None:
    written(tmp_path, many(1))
    header = json.loads((tmp_path / "bank.json").read_text())
    expected = (
        "format_version base_model dod_name dod_digest K D rows_per_shard num_soft_prompts num_failed made_from digest"
    )
    assert list(header) == expected.split()
    assert header["format_version"] == 2
