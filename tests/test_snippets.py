"""The code in README.md and docs/ runs, as it stands there.

A block of Python runs on names that its prelude supplies; PRELUDES has one for each block, in order, with a stand-in
where the block needs what is not here (Lightning, a model from the hub). A command of `dpo-kernels` is read by its own
parser, and run where that takes no time.
"""

import copy
import functools
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from places import ROOT

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import heads
import transformers

from dpo_kernels import LMHead, cli, linear_dpo_loss, linear_sequence_logps
from dpo_kernels.bench import command as bench
from dpo_kernels.testing import head_inputs
from dpo_kernels.tuning import command as tune

DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
NAMES = {"torch": torch, "F": F, "copy": copy, "LMHead": LMHead}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(document, language):
    return [code for name, code in BLOCK.findall((ROOT / document).read_text()) if name == language]


def model_and_batch():
    """A tiny model, and two pairs with prompt and padding: chosen, then rejected."""
    model = heads.build("qwen3")
    ids = torch.randint(3, 95, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return NAMES | {"model": model, "ids": ids, "input_ids": ids, "mask": mask, "labels": labels}


# Preludes: names for a block; and after `yield`, what has to be true of those that it left


def eager_and_ours(monkeypatch):
    ref_logps = torch.tensor([-20.0, -21.0, -19.0, -23.0])
    ref_chosen, ref_rejected = ref_logps.chunk(2)
    found = model_and_batch() | {"beta": 0.1, "ref_logps": ref_logps}
    found |= {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    yield found
    margins = (found["chosen"] - ref_chosen) - (found["rejected"] - ref_rejected)
    torch.testing.assert_close(found["loss"], -F.logsigmoid(0.1 * margins).mean())
    found["loss"].backward()


def nothing(monkeypatch):
    yield {}


def from_trl(monkeypatch):
    pytest.importorskip("trl")
    yield {}


def plain_tensors(monkeypatch):
    found = {}
    yield found
    assert found["hidden"].grad.abs().sum() > 0 < found["weight"].grad.abs().sum()


class Body(torch.nn.Module):
    """A model that is not transformers'."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50, bias=False)

    def forward(self, tokens):
        return self.embed(tokens).cumsum(1)


def loop_without_transformers(monkeypatch):
    model = Body()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.randint(50, (4, 6)), torch.randint(50, (4, 6)))] * 2
    functions = {"linear_dpo_loss": linear_dpo_loss, "linear_sequence_logps": linear_sequence_logps}
    yield NAMES | functions | {"model": model, "reference": reference, "optimizer": optimizer, "batches": batches}
    assert not torch.equal(model.head.weight, reference.head.weight)


def patched(monkeypatch):
    pytest.importorskip("trl")
    yield {}
    from dpo_kernels.trl import is_patched, unpatch

    assert is_patched("DPOTrainer", "KTOTrainer")
    unpatch()


def trainer_of_the_demo():
    """What a script for TRL's trainer has, with a model on disk, where the reference comes from too."""
    trl = pytest.importorskip("trl")
    from dpo_kernels.data.demo import demo_model, demo_preferences, demo_tokenizer
    from dpo_kernels.trl import DPOTrainer

    rows = demo_preferences(20)
    tokenizer = demo_tokenizer(str(row) for row in rows)
    demo_model(len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained("start")
    model = transformers.AutoModelForCausalLM.from_pretrained("start")
    config = functools.partial(trl.DPOConfig, use_cpu=True)
    found = {"DPOTrainer": DPOTrainer, "DPOConfig": config, "dataset": rows, "tokenizer": tokenizer, "model": model}
    return NAMES | found


def weighted_trainer(monkeypatch):
    found = trainer_of_the_demo()
    found["dataset"] = found["dataset"].add_column("weight", [0.5] * 20)
    yield found
    assert next(iter(found["trainer"].get_train_dataloader()))["pair_weights"].unique().tolist() == [0.5]


def any_other_trainer(monkeypatch):
    found = model_and_batch()
    yield found
    assert found["loss"].item() == pytest.approx(0.693147, abs=1e-5)  # the policy is the reference
    found["loss"].backward()


def lightning_module(monkeypatch):
    """In the place of Lightning, what the block needs of it."""
    from dpo_kernels.models import Preference, Reference, add_fused_lm_head

    stand_in = type("LightningModule", (torch.nn.Module,), {"device": torch.device("cpu")})
    found = model_and_batch() | {"Preference": Preference, "Reference": Reference}
    found |= {"add_fused_lm_head": add_fused_lm_head, "lightning": SimpleNamespace(LightningModule=stand_in)}
    yield found
    batch = {"input_ids": found["ids"], "attention_mask": found["mask"], "labels": found["labels"]}
    loss = found["DPO"](found["model"]).training_step(batch | {"pair_weights": torch.ones(2)}, 0)
    assert loss.item() == pytest.approx(0.693147, abs=1e-5)
    loss.backward()


def mean_of_a_token(monkeypatch):
    printed = []
    found = model_and_batch() | {"print": printed.append}
    yield found
    with torch.no_grad():
        expected = heads.eager_logps(found["model"](found["ids"], attention_mask=found["mask"]).logits, found["labels"])
    torch.testing.assert_close(printed[0], expected.sum() / (found["labels"][:, 1:] != -100).sum())


def settings_of_a_run(monkeypatch):
    """The model would be fetched: the settings are what is tried."""
    monkeypatch.setattr("dpo_kernels.training.train", lambda config: config, raising=False)
    found = {}
    yield found
    assert found["result"].dataset == "preferences.jsonl"


def each_prompt_once_in_trl(monkeypatch):
    found = trainer_of_the_demo()
    yield found
    batch = next(iter(found["trainer"].get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and len(batch["shift_labels"]) == 16
    assert found["trainer"].compute_loss(found["model"], batch).item() == pytest.approx(0.693147, abs=1e-5)


def each_prompt_once_in_a_loop(monkeypatch):
    from dpo_kernels.data import tokenize_preferences
    from dpo_kernels.data.demo import demo_model, demo_preferences, demo_tokenizer

    rows = demo_preferences(8)
    tokenizer = demo_tokenizer(str(row) for row in rows)
    pairs, _ = tokenize_preferences(rows, tokenizer)
    model = demo_model(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    found = NAMES | {"model": model, "reference": copy.deepcopy(model), "tokenizer": tokenizer}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    yield found | {"steps": [[pairs[n] for n in range(4)]], "optimizer": optimizer}
    assert not torch.equal(model.lm_head.weight, found["reference"].lm_head.weight)


def alone_in_a_group():
    """Of this process. One that an earlier test has left is not that."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def a_head_in_shards(monkeypatch):
    """With one rank, in this process."""
    alone_in_a_group()
    inputs = head_inputs()
    found = NAMES | inputs._asdict() | {"linear_dpo_loss": linear_dpo_loss, "weight": inputs.weight.detach()}
    try:
        yield found
    finally:
        torch.distributed.destroy_process_group()
    linear_dpo_loss(inputs.hidden, inputs.weight, inputs.labels, inputs.ref_logps).loss.backward()
    torch.testing.assert_close(found["weight"].grad.to_local(), inputs.weight.grad)


def sequences_in_parts(monkeypatch):
    """With one rank, in this process."""
    alone_in_a_group()
    inputs = head_inputs()
    found = NAMES | inputs._asdict() | {"linear_dpo_loss": linear_dpo_loss}
    try:
        yield found
    finally:
        torch.distributed.destroy_process_group()
    whole = inputs.to(torch.float32)
    linear_dpo_loss(*whole[:3], inputs.ref_logps, shift=True).loss.backward()
    torch.testing.assert_close(inputs.weight.grad, whole.weight.grad)
    torch.testing.assert_close(inputs.hidden.grad, whole.hidden.grad)


PRELUDES = {
    "README.md": [eager_and_ours, from_trl, plain_tensors, loop_without_transformers],
    "docs/drop_ins.md": [
        *(from_trl, patched, weighted_trainer, any_other_trainer, lightning_module),
        mean_of_a_token,
    ],
    "docs/scaling.md": [a_head_in_shards, sequences_in_parts],
    "docs/training.md": [settings_of_a_run, each_prompt_once_in_trl, each_prompt_once_in_a_loop],
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_has_a_prelude(document):
    found, preludes = blocks(document, "python"), PRELUDES.get(document, [])
    assert len(found) == len(preludes), f"{document} has {len(found)} blocks of Python, PRELUDES {len(preludes)}"


@pytest.mark.usefixtures("process_left_as_it_was")
@pytest.mark.parametrize(
    ("document", "number"),
    [(document, number) for document, preludes in PRELUDES.items() for number in range(len(preludes))],
)
def test_block_runs(document, number, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    prelude = PRELUDES[document][number](monkeypatch)
    names = next(prelude)
    names["__name__"] = "a_block"
    exec(compile(blocks(document, "python")[number], f"{document}, block {number + 1}", "exec"), names)
    assert next(prelude, None) is None


# What starts the command in several processes, and what is no command of this package.
LAUNCHERS = re.compile(
    r"^(?:srun (?:--\S+ )*)?(?:\w+=\w+ )*(?:accelerate launch|torchrun) (?:--\w+ (?:(?!-)\S+ )?)*-m dpo_kernels (.*)"
)
OTHERS = (
    "export OMP_NUM_THREADS=",
    "'first=$(scontrol' ",
    "pip install ",
    "DPO_KERNELS_BUILD=cuda pip ",
    "python -m pytest ",
    "python tests/",
    "bash benchmarks/",
)


def commands(document):
    """What a reader would type, without comments; `dpo-kernels ...` also within the text."""
    text = (ROOT / document).read_text()
    for code in blocks(document, "bash"):
        lines = code.replace("\\\n", " ").splitlines()
        yield from (shlex.join(shlex.split(part, comments=True)) for line in lines for part in line.split("&&"))
    yield from re.findall(r"`(dpo-kernels [a-z]+(?: [^`]+)?)`", BLOCK.sub("", text))


def arguments_of(command):
    """Those of `dpo-kernels`; None where it is another command."""
    if command.startswith("dpo-kernels "):
        return shlex.split(command)[1:]
    if launched := LAUNCHERS.match(command):
        return shlex.split(launched[1])
    assert command.startswith(OTHERS), f"neither dpo-kernels nor known to this test: {command}"
    return None


ALL = [(document, command) for document in DOCUMENTS for command in dict.fromkeys(commands(document)) if command]
OURS = [(document, command) for document, command in ALL if arguments_of(command) is not None]


@pytest.fixture
def read_only(monkeypatch, tmp_path):
    """A folder with the files that the commands name; what they would take minutes for ends after it was checked."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "tiny_qwen2.json", "model.json")
    Path("CONFIG.yaml").write_text("model: config:model.json\ntokenizer: train:300\ndataset: preferences.jsonl\n")
    ran = []

    def bench_run(options):
        ran.append(list(bench._jobs(options, torch.device("cpu"))))
        return 0

    def tune_run(options):
        ran.append(tune.heads_of(options, torch.device("cpu")))
        return 0

    monkeypatch.setitem(cli.COMMANDS, "bench", (bench.add_arguments, bench_run, ""))
    monkeypatch.setitem(cli.COMMANDS, "tune", (tune.add_arguments, tune_run, ""))
    monkeypatch.setattr("dpo_kernels.training.train", ran.append, raising=False)
    monkeypatch.setattr(cli, "show_preview", lambda config, pairs: ran.append(config))
    monkeypatch.setattr(cli, "_speak_plainly", lambda handler: None)
    return ran


@pytest.mark.parametrize(("document", "command"), OURS)
def test_command_is_one(document, command, read_only, capsys):
    arguments = arguments_of(command)
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        return
    assert cli.main(arguments) == 0, capsys.readouterr().err
    assert read_only or (arguments[0] in ("plan", "env") and capsys.readouterr().out)


def test_commands_are_found():
    assert {arguments_of(command)[0] for _, command in OURS} == {"train", "preview", "bench", "plan", "tune", "env"}
    assert any("accelerate launch" in command for _, command in OURS)
