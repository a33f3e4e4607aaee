"""Fixtures that several test files share."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST = (
    "test_layouts test_convert test_cuda_build test_checkpoint test_run test_faults"
    " test_in_training test_lora test_average test_documents test_train_cli test_doors"
    " test_cuda_kernels test_machines test_losses_of_runs test_timeouts test_server"
    " test_adapters test_run_folder test_lora_dropout test_resume test_verification_rewards"
    " test_param_gather test_reward_model test_count"
).split()
"""Files that take longer than 15 seconds; these go first, so that two workers end together."""
sys.path.insert(0, str(ROOT))  # tests.dist, examples and tools are no installed packages


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Only tests marked ``gpu`` see one, themselves and in the programs that they start: the others
    compare CPU computations, some of them on more ranks than a machine has GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("gpu") is None:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            if "torch" in sys.modules:
                patch.setattr(sys.modules["torch"].cuda, "is_available", lambda: False)
        return (yield)


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory) -> Path:
    """A Llama of 260 thousand random weights with a tokenizer, as a Hugging Face folder."""
    from tests.made_models import make_llama

    return make_llama(tmp_path_factory.mktemp("small_llama") / "small_llama")


@pytest.fixture
def small_files():
    """A context in which no file can grow over 1 KB: writing fails as on a full disk."""

    @contextlib.contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def internlm2_tokenizer(tmp_path_factory) -> Path:
    """A small tokenizer in InternLM2's layout: tokenizer.model, tokenizer.json, chat template."""
    from tests.made_tokenizers import make_internlm2_tokenizer

    return make_internlm2_tokenizer(tmp_path_factory.mktemp("internlm2") / "internlm2_tokenizer")


@pytest.fixture(scope="session")
def internlm2_of_the_hub(tmp_path_factory) -> Path:
    """A small InternLM2 as on the hub: tokenizer.model alone, an auto_map, weights."""
    from tests.made_models import make_internlm2_of_the_hub

    return make_internlm2_of_the_hub(tmp_path_factory.mktemp("hub") / "internlm2_of_the_hub")


@pytest.fixture(scope="session")
def preference_files(tmp_path_factory) -> Path:
    """The folder with the files of tests.made_rows.FILES, one per schema."""
    from tests.made_rows import write_rows

    return write_rows(tmp_path_factory.mktemp("preference_files"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data, tokenizers and a small pretrained model beside the checkout (or at RMEGA_SHARED),
    for additional cases alone."""
    path = os.environ.get("RMEGA_SHARED", ROOT.parent / "shared")
    if not path or not (Path(path) / "data").is_dir():
        pytest.skip(f"no real data at {path or 'RMEGA_SHARED'}: a folder for additional cases")
    return Path(path)


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if "shared_dir" in item.fixturenames:
            item.add_marker(pytest.mark.real_data)
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable: by file


def pytest_terminal_summary(terminalreporter) -> None:
    """The table of faults, where any were tried: docs/faults.md shows it."""
    runs = sys.modules.get("tests.runs")
    if runs and runs.FAULTS:
        terminalreporter.write_line(runs.fault_table())
