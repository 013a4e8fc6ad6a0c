"""What a run remembers when it goes on from a checkpoint, what it does not go on from, and what it says of itself."""

import json
import math

import pytest
import torch
from datasets import Dataset

pytest.importorskip("accelerate", reason="the loop needs accelerate, which is not installed")

from dpo_kernels.data.batching import PairCollator
from dpo_kernels.training import loop, plots, setup, state
from dpo_kernels.training.checkpoint import MetricsLog, read_metrics
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.loop import train
from dpo_kernels.training.sizes import data_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that trains a little, again in the same directory where it is called again."""
    monkeypatch.setattr(loop, "plot_training_curves", lambda metrics, picture: None)

    def call(**changes):
        settings = {
            "model": "demo",
            "dataset": "demo",
            "max_rows": 12,
            "tokenizer": "train:300",
            "max_length": 256,
            "max_steps": 4,
            "per_device_batch_size": 2,
            "eval_steps": 1,
            "save_steps": 2,
            "progress_bar": False,
            "output_dir": str(tmp_path / "run"),
            "cache_dir": str(tmp_path / "cache"),
        }
        return train(TrainConfig(**settings | changes))

    return call


@pytest.fixture
def stop_after(monkeypatch):
    """A function that ends runs, as by Ctrl-C, when they write an evaluation of that step; None: no more."""
    write, last = MetricsLog.write, []

    def stop(self, values):
        write(self, values)
        if values["step"] in last and "eval/loss" in values:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsLog, "write", stop)
    return lambda step: last.__setitem__(slice(None), [step])


def test_the_best_evaluation_is_remembered(run, stop_after, monkeypatch):
    """A later one is compared with it, not with the model that training started from."""
    compared = []

    def better(metric, new, old):
        compared.append(old.get("step"))
        return "step" not in old  # the first evaluation after the start, and no other

    monkeypatch.setattr(state, "_better", better)
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        run()
    stop_after(None)
    del compared[:]
    assert run().best_dir is not None
    assert compared == [1, 1]  # of steps 3 and 4, after the checkpoint of step 2


def test_other_starting_weights_are_refused(run, stop_after, monkeypatch):
    """Whatever the settings say: the file that they name may hold another model by now."""
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        run()
    stop_after(None)
    load = setup.load_model

    def changed(*arguments):
        model = load(*arguments)
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-3
        return model

    with monkeypatch.context() as patch:
        patch.setattr(setup, "load_model", changed)
        with pytest.raises(ValueError, match="the starting weights"):
            run()
    assert run().steps == 4


def test_other_tokens_of_the_same_lengths_are_other_data():
    rows = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}] * 2
    changed = [rows[0], rows[1] | {"chosen_ids": [4, 7]}]
    first, again, other, swapped = (
        data_fingerprint(Dataset.from_list(each)) for each in (rows, rows, changed, changed[::-1])
    )
    assert first == again and len({first, other, swapped}) == 3


@pytest.mark.parametrize("setting", ["temperature", "ld_alpha", None])
def test_cached_references_belong_to_model_and_settings(run, monkeypatch, setting):
    """The policy starts at the reference, so the first loss is log 2: unless the reference comes from a run before,
    with another temperature, other weights of tokens, or of another model."""
    options = {"reference": "precompute", "max_steps": 1, "logging_steps": 1, "eval_fraction": 0, "save_steps": 0}
    run(**options)
    if setting is None:
        load = setup.load_model

        def changed(*arguments):
            model = load(*arguments)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
            return model

        monkeypatch.setattr(setup, "load_model", changed)
    changes = {"temperature": {"temperature": 2.0}, "ld_alpha": {"ld_alpha": 0.5}, None: {}}[setting]
    (row,) = read_metrics(run(**options, **changes, overwrite=True).metrics_path)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_tokens_per_second_count_what_the_model_is_given(run, monkeypatch):
    """Padding is no token, and a prompt is computed for both responses."""
    given, collate = [0, 0], PairCollator.__call__

    def counted(self, examples):
        batch = collate(self, examples)
        given[0] += int(batch["attention_mask"].sum())
        given[1] += int((batch["labels"] != -100).sum())
        return batch

    monkeypatch.setattr(PairCollator, "__call__", counted)
    result = run(max_steps=3, logging_steps=3, eval_fraction=0, save_steps=0)
    (row,) = read_metrics(result.metrics_path)
    assert row["tokens_per_second"] / row["labelled_tokens_per_second"] == pytest.approx(given[0] / given[1])


def test_curves_show_what_their_names_say(tmp_path, monkeypatch):
    Axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, metrics = {}, tmp_path / "metrics.jsonl"
    names = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected")
    train_row = {name: float(place) for place, name in enumerate(names, start=1)}
    rows = [{"step": 1, **train_row}, {"step": 2, **{f"eval/{name}": -value for name, value in train_row.items()}}]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot = Axes.plot

    def noted(self, x, y, *style, **options):
        drawn.setdefault(options["label"], []).extend(y)
        return plot(self, x, y, *style, **options)

    monkeypatch.setattr(Axes, "plot", noted)
    plots.plot_training_curves(metrics, tmp_path / "curves.png")
    assert drawn["train"] == [1.0, 2.0, 3.0] and drawn["held out"] == [-1.0, -2.0, -3.0]
    assert drawn["chosen"] == [4.0] and drawn["chosen, held out"] == [-4.0]
    assert drawn["rejected"] == [5.0] and drawn["rejected, held out"] == [-5.0]
