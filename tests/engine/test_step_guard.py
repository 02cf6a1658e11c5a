"""Forks and exits while native steps run, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pellucid.engine import step_guard
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.tiny_models import write_tiny_model

pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import os, sys, threading, time
from pellucid import LLM, SamplingParams
from pellucid.engine import loading, step_guard
from tests.support.fake_tokenizer import FakeTokenizer
loading.Tokenizer.from_gguf = lambda metadata: FakeTokenizer()
llm = LLM(sys.argv[1], threads=2, kv_cache_memory=1 << 26)
params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=0)
prompt = [1 + i % 50 for i in range(300)]
def answer():
    llm.reset_prefix_cache()
    completion = llm.generate(prompt, params)[0].outputs[0]
    return completion.token_ids, repr(completion.logprobs)
def in_child(fn):
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if fn() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
def busy():
    while True:
        llm.logits(prompt)
"""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return write_tiny_model(path, "llama", vocab_size=FakeTokenizer.vocab_size, metadata={"llama.block_count": 8})


def run(model_path: Path, script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + script, str(model_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_forked_child_answers_with_threads_of_its_own(model_path: Path) -> None:
    script = """
wanted = answer()
assert in_child(lambda: answer() == wanted and in_child(lambda: answer() == wanted) == 0) == 0
assert answer() == wanted
del llm
"""
    result = run(model_path, script)
    assert result.returncode == 0, result.stderr


def test_a_forked_child_can_let_go_of_what_it_never_used(model_path: Path) -> None:
    script = """
def let_go():
    global llm
    llm.close()
    del llm
    return True
assert in_child(let_go) == 0
answer()
"""
    result = run(model_path, script)
    assert result.returncode == 0, result.stderr


def test_a_fork_waits_for_another_threads_step(model_path: Path) -> None:
    script = """
wanted = answer()
threading.Thread(target=busy, daemon=True).start()
for _ in range(3):
    time.sleep(0.01)
    assert in_child(lambda: answer() == wanted) == 0
"""
    result = run(model_path, script)
    assert result.returncode == 0, result.stderr


EXIT_MID_STEP = """
threading.Thread(target=busy, daemon=True).start()
time.sleep(0.1)
"""


def test_a_daemon_thread_in_a_step_does_not_abort_the_exit(model_path: Path) -> None:
    for _ in range(3):
        result = run(model_path, EXIT_MID_STEP)
        assert (result.returncode, result.stderr) == (0, "")


ASYNC = """
import asyncio
from pellucid import AsyncEngine
llm.close()
endless = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
async def main():
    engine = AsyncEngine(sys.argv[1], threads=2, kv_cache_memory=1 << 26, max_unread_tokens=100000)
    async def keep_busy():
        while True:
            await engine.complete([1, 2, 3], endless)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    tasks = [asyncio.create_task(keep_busy()) for _ in range(4)]
    async for token in engine.generate(prompt, endless):
        break
"""


@pytest.mark.parametrize(
    "end",
    [
        "asyncio.run(main())",
        "loop = asyncio.new_event_loop(); loop.run_until_complete(main())",
        "loop = asyncio.new_event_loop(); loop.run_until_complete(main()); assert in_child(lambda: True) == 0",
    ],
)
def test_an_async_engine_at_work_does_not_keep_the_process_from_forking_and_exiting(model_path: Path, end: str) -> None:
    result = run(model_path, ASYNC + end)
    assert result.returncode == 0, result.stderr


def test_whoever_waits_to_fork_goes_before_the_next_step() -> None:
    lock, order = threading.RLock(), []
    step_guard.guard_steps(lock)

    def fork() -> None:
        step_guard._acquire()
        order.append("fork")
        step_guard._release()

    forker = threading.Thread(target=fork)
    with lock:
        forker.start()
        while step_guard._forking.acquire(blocking=False):
            step_guard._forking.release()
    step_guard.let_forks_pass()
    with lock:
        order.append("step")
    forker.join()
    assert order == ["fork", "step"]


def test_without_the_guard_it_does(model_path: Path) -> None:
    """The mutant."""
    if sys.version_info >= (3, 14):
        pytest.skip("this Python lets daemon threads hang instead")
    unguarded = "step_guard._locks.clear()\n" + EXIT_MID_STEP
    assert any(run(model_path, unguarded).returncode != 0 for _ in range(5))
