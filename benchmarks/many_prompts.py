"""What thousands of tasks cost beside the tuning itself: memory, a restart, and MLflow.

    python benchmarks/many_prompts.py
    python benchmarks/many_prompts.py --quick --json figures.json

Three questions, each answered in processes of their own:

- Peak memory of `tune_soft_prompts` against the number of tasks: a real fleet on a tiny random Llama, whose own memory does
  not hide the rest, with an eighth of the tasks and with all of them.
- Restart: the seconds from calling it on a bank of which all but one prompt is finished to the end of its first epoch.
- Logging: the stage of `softprompt tune` on a real MLflow server, with random numbers in place of tuned prompts, so that only
  the keeping and logging is left: seconds and HTTP requests.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measuring import in_own_process, peak_mib, write_figures

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import BaseModelRef, reference_of
from softprompt_registry.dod.store import DodStore, dod_written_whole
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.soft_prompts.engines import InThisProcess, Tuned
from softprompt_registry.soft_prompts.fleet import FleetStatistics
from softprompt_registry.soft_prompts.progress import DodOrigin
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.soft_prompts.tuning import tune_soft_prompts
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig

PAIRS = 500
LABELS = ("music", "films", "books", "art", "software")
CONFIG = TuningConfig(
    epochs=1, patience_epochs=None, batch_size=4, slots=8, max_train_pairs=4, max_validation_pairs=2, max_test_pairs=0
)
EPOCHS_LOGGED = 20


def write_dod(path: Path, num_tasks: int) -> None:
    with dod_written_whole(path, "benchmark") as store:
        for task in range(num_tasks):
            pairs = tuple(
                Pair(f"text number {row} of task {task}", LABELS[row % 5], "train" if row < 400 else "validation")
                for row in range(PAIRS)
            )
            store.add_task(Task(name=f"task{task:07d}", kind="classification", pairs=pairs, labels=LABELS))


def tiny_base_model() -> BaseModel:
    """A random two-layer Llama with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0, "<eos>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **sizes))
    return BaseModel(model, tokenizer, reference_of(model, tokenizer, name="tiny", revision=None, dtype="float32"))


def tune_all(folder: Path) -> dict[str, float]:
    """The real thing, in this process."""
    base = tiny_base_model()
    with DodStore.open(folder / "dod.sqlite") as store:
        started = time.perf_counter()
        tune_soft_prompts(base, store.stored_tasks(), CONFIG, folder / "bank")
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_mib": peak_mib()}


def restart(folder: Path) -> dict[str, float]:
    """All prompts but one are made up; then a real start, until its first epoch has ended."""
    base = tiny_base_model()

    class Reached(Exception):
        pass

    class ButOne(MadeUp):
        def tune(self, tasks: Iterable[Task], *rest: Any) -> Iterator[Tuned]:
            made = super().tune(tasks, *rest)
            for number, tuned in enumerate(made, start=2):
                yield tuned
                if number == self.num_tasks:
                    raise Reached

    class Timed(InThisProcess):
        def tune(
            self, tasks: Iterable[Task], config: TuningConfig, origin: DodOrigin, on_epoch: Callable[[str, int], None]
        ) -> Iterator[Tuned]:
            def stop(task: str, epoch: int) -> None:
                raise Reached

            return super().tune(tasks, config, origin, stop)

    with DodStore.open(folder / "dod.sqlite") as store:
        tasks = store.stored_tasks()
        try:
            tune_soft_prompts(ButOne(base.ref, len(tasks)), tasks, CONFIG, folder / "restarted")
        except Reached:
            pass
        started = time.perf_counter()
        try:
            tune_soft_prompts(Timed(base), tasks, CONFIG, folder / "restarted")
        except Reached:
            return {"restart_s": time.perf_counter() - started}
    raise AssertionError("the second start found nothing left to do")


class MadeUp:
    """An engine whose soft prompts are random numbers with curves of 20 epochs."""

    def __init__(self, ref: BaseModelRef, num_tasks: int) -> None:
        self.ref = ref
        self.num_tasks = num_tasks
        self.statistics = FleetStatistics()

    def tune(self, tasks: Iterable[Task], config: TuningConfig, origin: DodOrigin, on_epoch: Any) -> Iterator[Tuned]:
        generator = torch.Generator().manual_seed(0)
        shape = (config.num_virtual_tokens, self.ref.hidden_size)
        initial = torch.randn(shape, generator=generator)
        for task in tasks:
            losses = [2.0 / (epoch + 1) for epoch in range(EPOCHS_LOGGED)]
            record = SoftPromptRecord(
                task=task.name,
                kind=task.kind,
                base_model=self.ref,
                template=task.template,
                labels=task.labels,
                task_digest=task.digest,
                dod_name=origin.name,
                dod_digest=origin.digest,
                ground_truth=task.ground_truth,
                tuning={"best_epoch": 20, "num_train_pairs": 400, "train_losses": losses, "validation_losses": losses},
                metrics={"validation_loss": losses[-1], "label_accuracy": 0.9, "exact_match": 0.9},
            )
            yield Tuned(task.name, SoftPrompt(torch.randn(shape, generator=generator), initial, record))


def log_all(folder: Path) -> dict[str, float]:
    """The whole stage on a real MLflow server, with a base model of the packaged one's width."""
    import mlflow
    from mlflow.utils import rest_utils

    from softprompt_registry.stages import tuning as stage

    base = tiny_base_model()
    ref = BaseModelRef.from_json({**base.ref.to_json(), "hidden_size": 576})
    requests = 0
    real_request = rest_utils._get_http_response_with_retries

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal requests
        requests += 1
        return real_request(*args, **kwargs)

    rest_utils._get_http_response_with_retries = counted
    with _mlflow_server(folder) as uri:
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment("benchmark")
        requests = 0
        with DodStore.open(folder / "dod.sqlite") as store:
            engine = MadeUp(ref, len(store.task_names()))
            bank = folder / "logged"
            kept = time.perf_counter()
            tune_soft_prompts(
                engine, store.stored_tasks(), TuningConfig(), bank, dod_name=store.name, dod_digest=store.digest
            )
            kept = time.perf_counter() - kept
        started = time.perf_counter()
        stage.tune(engine, folder / "dod.sqlite", TuningConfig(), bank)  # takes the finished bank over: only logs
        return {"log_s": time.perf_counter() - started, "log_requests": requests, "keep_s": kept}


@contextmanager
def _mlflow_server(folder: Path) -> Iterator[str]:
    """A server on a free port with SQLite and artifacts in `folder`; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--default-artifact-root", str(folder / "artifacts"), "--no-serve-artifacts"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise RuntimeError((folder / "server.log").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


QUESTIONS = {"tune": tune_all, "restart": restart, "log": log_all}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=5500, help="for restart and logging")
    parser.add_argument("--tuned-tasks", type=int, default=1600, help="for memory; an eighth of them beside it")
    parser.add_argument("--quick", action="store_true", help="a tenth of the tasks")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--question", choices=QUESTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.question:
        print(json.dumps(QUESTIONS[arguments.question](arguments.folder)))
        return
    if arguments.quick:
        arguments.tasks, arguments.tuned_tasks = arguments.tasks // 10, arguments.tuned_tasks // 10
    few, many = arguments.tuned_tasks // 8, arguments.tuned_tasks
    small, large = (_in_own_process("tune", number) for number in (few, many))
    rest = _in_own_process("restart", arguments.tasks) | _in_own_process("log", arguments.tasks)
    print(f"peak memory of tuning {few} tasks: {small['peak_mib']:.0f} MiB, {many} tasks: {large['peak_mib']:.0f} MiB")
    print(f"restart with {arguments.tasks - 1} of {arguments.tasks} prompts finished: {rest['restart_s']:.1f} s")
    print(f"keeping {arguments.tasks} prompts on the disk: {rest['keep_s']:.1f} s")
    print(f"logging them to MLflow: {rest['log_s']:.1f} s, {rest['log_requests']:.0f} requests")
    figures = {"peak_mib": large["peak_mib"], "peak_mib_eighth": small["peak_mib"], **rest}
    write_figures(arguments.json, figures)


def _in_own_process(question: str, num_tasks: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dod(folder / "dod.sqlite", num_tasks)
        return in_own_process(__file__, "--question", question, "--folder", name, folder=folder)


if __name__ == "__main__":
    main()
