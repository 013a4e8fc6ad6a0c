"""Step by step against TRL's `DPOTrainer`: the same tiny model and data, losses, gradients and metrics within 1e-4.

TRL trains; its batches, gradients and logs are recorded. The same steps are then run with `LMHead` from the same
initial weights, each on the weights that our own earlier steps led to, and compared with the record.

AdamW divides by the size of a gradient, so that an entry which is all rounding becomes a whole update, of either sign.
In the most sensitive case (discopop at tau 0.05 under the alpha divergence) the usual epsilon of 1e-8 lets that happen
to one entry of 25,000 in the first step, with a gradient of 4e-8 where the median is 1e-3, and the second gradient of
two fp32 runs then differs by 1.6e-4: TRL's by 3.1e-4 and ours by 1.5e-4 from the same run in fp64. Both sides
therefore take 1e-5, and the difference is 1.7e-5.
"""

from __future__ import annotations

import copy
import json
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("trl", reason="compares with TRL, which is not installed")
pytest.importorskip("peft", reason="compares LoRA too, and peft is not installed")

from datasets import Dataset
from grids import each_value
from peft import LoraConfig, get_peft_model
from places import SHARED
from transformers import Qwen2Config, Qwen2ForCausalLM, get_scheduler
from trl import DPOConfig, DPOTrainer
from trl_runs import LOSS_OPTIONS, MPO, preferences, tokenizer, trl_names

from dpo_kernels.data.batching import PairCollator
from dpo_kernels.data.demo import demo_tokenizer
from dpo_kernels.losses import BATCH_LOSSES, F_DIVERGENCE_LOSSES, dpo_loss, length_desensitized_weights
from dpo_kernels.models.head import LMHead
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.loop import train

pytestmark = pytest.mark.usefixtures("process_left_as_it_was")
TOLERANCE = 1e-4
STEPS, PAIRS = 5, 4
BETA, LEARNING_RATE, ADAM_EPSILON = 0.1, 2e-3, 1e-5  # log-ratios reach a few nats in five steps
VOCAB_SIZE = 257  # not a round number
STATS = ("entropy", "is_top1", "mean_logit")


class Step(NamedTuple):
    batch: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]  # before clipping
    metrics: dict[str, float]


class RecordingTrainer(DPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.initial_weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.steps = []

    def training_step(self, model, inputs, *args, **kwargs):
        batch = {name: tensor.clone() for name, tensor in inputs.items()}
        loss = super().training_step(model, inputs, *args, **kwargs)
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.steps.append(Step(batch, {name: weight.grad.clone() for name, weight in weights.items()}, {}))
        return loss

    def log(self, logs, *args, **kwargs):
        super().log(logs, *args, **kwargs)
        if "loss" in logs:
            self.steps[-1].metrics.update(logs)


def tiny_model(vocab_size: int = VOCAB_SIZE, **settings) -> Qwen2ForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=vocab_size,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.2,  # logits of unit size: the usual 0.02 would leave every distribution flat
                bos_token_id=None,
                eos_token_id=1,
                **settings,
            )
        )


def other_checkpoint(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """A reference away from the start, so that no log-ratio is 0 from the first step on."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return other


def train_with_trl(directory, model, reference, options, *, data=None, peft_config=None, **arguments):
    """`data` is a dataset and its tokenizer; those of `preferences` if None."""
    dataset, processing_class = data or (preferences(), tokenizer())
    settings = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "adamw_torch",
        "learning_rate": LEARNING_RATE,
        "adam_epsilon": ADAM_EPSILON,
        "lr_scheduler_type": "linear",
        "max_steps": STEPS,
        "per_device_train_batch_size": PAIRS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_length": None,
    }
    trainer = RecordingTrainer(
        copy.deepcopy(model),
        None if peft_config else copy.deepcopy(reference),
        args=DPOConfig(str(directory), beta=BETA, **trl_names(**options), **{**settings, **arguments}),
        train_dataset=dataset,
        processing_class=processing_class,
        peft_config=peft_config,
    )
    trainer.train()
    assert len(trainer.steps) >= STEPS
    return trainer


def labels_of(batch):
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


def inputs_of(batch):
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@torch.no_grad()
def reference_logps(head, batch, ld_alpha=None):
    labels = labels_of(batch)
    weights = None if ld_alpha is None else length_desensitized_weights(labels, ld_alpha)
    hidden, _ = head.hidden_states(**inputs_of(batch))
    return head.sequence_logps(hidden, labels, shift=True, token_weights=weights).logps


def metrics_of(output, stats):
    """What TRL logs, from a `LinearDPOOutput` and the statistics [2B, T] of the labelled tokens."""
    margins = output.chosen_rewards - output.rejected_rewards
    chosen_logps, rejected_logps = output.logps.chunk(2)
    chosen_tokens, rejected_tokens = output.num_tokens.chunk(2)
    chosen_logits, rejected_logits = stats["mean_logit"].sum(1).chunk(2)
    means = {
        "loss": output.loss,
        "rewards/chosen": output.chosen_rewards.mean(),
        "rewards/rejected": output.rejected_rewards.mean(),
        "rewards/accuracies": (margins > 0).float().mean(),
        "rewards/margins": margins.mean(),
        "logps/chosen": chosen_logps.mean(),
        "logps/rejected": rejected_logps.mean(),
        "logits/chosen": chosen_logits.sum() / chosen_tokens.sum(),
        "logits/rejected": rejected_logits.sum() / rejected_tokens.sum(),
        "entropy": stats["entropy"].sum() / output.num_tokens.sum(),
        "mean_token_accuracy": stats["is_top1"].chunk(2)[0].sum() / chosen_tokens.sum(),
    }
    return {name: value.item() for name, value in means.items()}


def assert_metrics_agree(ours, theirs, where, ties=0.0):
    """Relative to each metric, down to what fp32 leaves of it. Rewards are differences of log-probabilities that are
    known to a few units in the last place, and logits of unit size cancel in their mean. `ties`: the share of pairs
    whose margin is below that, which may count as accurate or not."""
    unit = 4 * torch.finfo(torch.float32).eps
    size = max(abs(theirs["logps/chosen"]), abs(theirs["logps/rejected"]))
    floors = {"rewards": BETA * unit * size, "logits": unit}
    for name, value in ours.items():
        limit = TOLERANCE * abs(theirs[name]) + floors.get(name.split("/")[0], 0.0)
        if name == "rewards/accuracies":
            limit = ties
        assert abs(value - theirs[name]) <= limit, f"{where}: {name} is {value:.9g}, TRL has {theirs[name]:.9g}"


def replay(model, reference, steps, options, grouped=True, **fused):
    """Our training run over the recorded batches, held against the record at each step. `grouped` is whether gradients
    are expected to be formed in the forward, in groups of pairs."""
    model.train()
    head, reference_head = LMHead.from_model(model), LMHead.from_model(reference.eval())
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, eps=ADAM_EPSILON, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=len(steps))
    for number, step in enumerate(steps, 1):
        labels = labels_of(step.batch)
        ref_logps = reference_logps(reference_head, step.batch, options.get("ld_alpha"))
        hidden, _ = head.hidden_states(**inputs_of(step.batch))
        output = head.dpo_loss(hidden, labels, ref_logps, shift=True, **{"beta": BETA, **options, **fused})
        assert ("GroupedLoss" in output.loss.grad_fn.name()) == grouped
        output.loss.backward()
        with torch.no_grad():
            stats = head.sequence_logps(hidden, labels, shift=True, stats=STATS).stats

        assert step.gradients.keys() == weights.keys()
        for name, theirs in step.gradients.items():
            difference = (weights[name].grad - theirs).norm().item()
            assert difference <= TOLERANCE * theirs.norm().item(), f"step {number}: gradient of {name} {difference:.3g}"
        ours = metrics_of(output, stats)
        ours["grad_norm"] = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0).item()
        ours["learning_rate"] = scheduler.get_last_lr()[0]
        margins = output.chosen_rewards - output.rejected_rewards
        ties = (margins.abs() <= BETA * 1e-6 * output.logps.abs().max()).float().mean().item()
        assert_metrics_agree(ours, step.metrics, f"step {number}", ties)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def compare(directory, options, model, reference=None, *, data=None, **fused):
    """The reference is the starting checkpoint if None."""
    reference = copy.deepcopy(model if reference is None else reference)
    steps = train_with_trl(directory, model, reference, options, data=data).steps
    replay(model, reference, steps, options, **fused)


@pytest.mark.parametrize("loss_type", LOSS_OPTIONS)
def test_every_loss_agrees(tmp_path, loss_type):
    options = {"loss_type": loss_type, **LOSS_OPTIONS[loss_type]}
    compare(tmp_path, options, tiny_model(), grouped=loss_type not in BATCH_LOSSES)


@pytest.mark.parametrize(
    "loss_type, f_divergence",
    each_value(sorted(F_DIVERGENCE_LOSSES.intersection(LOSS_OPTIONS) - {"sft"}), ["forward_kl", "js", "alpha"]),
)
def test_every_f_divergence_agrees(tmp_path, loss_type, f_divergence):
    options = {"loss_type": loss_type, "f_divergence": f_divergence, "f_alpha": 0.4, **LOSS_OPTIONS[loss_type]}
    model = tiny_model()
    compare(tmp_path, options, model, other_checkpoint(model))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(MPO, id="weighted sum of losses"),
        pytest.param({"loss_type": "sigmoid", "ld_alpha": 0.3}, id="length-desensitized"),
        pytest.param({"loss_type": "ipo", "ld_alpha": 0.0}, id="length-desensitized, lengths count in full"),
        pytest.param({**MPO, "ld_alpha": 0.3}, id="length-desensitized, likelihood does not"),
        pytest.param({"loss_type": "sigmoid", "use_weighting": True}, id="WPO"),
        pytest.param({"loss_type": "ipo", "use_weighting": True, "ld_alpha": 0.3}, id="WPO, weights from all tokens"),
        pytest.param({"loss_type": ["apo_zero", "sigmoid_norm"], "use_weighting": True}, id="WPO of a sum of losses"),
        pytest.param({"loss_type": "sigmoid", "f_divergence": "alpha", "f_alpha": 1.0}, id="alpha 1 is reverse_kl"),
    ],
)
def test_combinations_agree(tmp_path, options):
    model = tiny_model()
    compare(tmp_path, options, model, other_checkpoint(model))


@pytest.mark.parametrize("options", [MPO, {"loss_type": "ipo", "use_weighting": True}], ids=["sum", "WPO"])
def test_every_path_of_a_trained_head_agrees(tmp_path, options):
    model = tiny_model()
    steps = train_with_trl(tmp_path, model, model, options).steps
    tokens = [(labels_of(step.batch) != -100).sum(1).view(2, -1).sum(0) for step in steps]
    largest_pair = max(int(pairs.max()) for pairs in tokens)
    assert all(int(pairs.sum()) > largest_pair for pairs in tokens)  # so each batch takes more than one group
    replay(copy.deepcopy(model), model, steps, options, chunk_bytes=largest_pair * VOCAB_SIZE * 4)
    replay(copy.deepcopy(model), model, steps, options, chunk_bytes=0, grouped=False)


@pytest.mark.parametrize(
    "options", [{"loss_type": "sigmoid"}, {"loss_type": "ipo", "ld_alpha": 0.3}], ids=["plain", "ld"]
)
def test_lora_under_a_frozen_head_agrees(tmp_path, options):
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = tiny_model()
    trainer = train_with_trl(tmp_path, model, None, options, peft_config=config)
    policy = get_peft_model(copy.deepcopy(model), config)
    policy.load_state_dict(trainer.initial_weights)
    assert not policy.get_output_embeddings().weight.requires_grad
    replay(policy, model, trainer.steps, options, grouped=False)


def test_tied_embeddings_agree(tmp_path):
    compare(tmp_path, {"loss_type": "sigmoid"}, tiny_model(tie_word_embeddings=True))


def test_the_collator_makes_the_same_batches(tmp_path):
    trainer = train_with_trl(tmp_path, tiny_model(), tiny_model(), {"loss_type": "sigmoid"})
    pairs = list(trainer.train_dataset)
    theirs, ours = trainer.data_collator(pairs), PairCollator(tokenizer().pad_token_id)(pairs)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert torch.equal(ours["labels"], labels_of(theirs))
    assert ours["num_labelled"] == int(theirs["completion_mask"].sum())


def test_real_conversations_agree(tmp_path):
    path = SHARED / "data" / "preferences_en.jsonl"
    if not path.exists():
        pytest.skip(f"no preference data at {path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = sorted(rows, key=lambda row: len(json.dumps(row)))[: STEPS * PAIRS]
    texts = (message["content"] for row in rows for messages in row.values() for message in messages)
    data = Dataset.from_list(rows), demo_tokenizer(texts, 512)
    compare(tmp_path, {"loss_type": "sigmoid"}, tiny_model(vocab_size=512), data=data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the learning rate and the number of epochs
def test_the_training_loop_agrees(tmp_path):
    """From a file of text to the rows of metrics. An optimizer step takes all pairs, since the order is each one's own,
    in two micro-batches."""
    pairs = preferences().select(range(2 * PAIRS))
    pairs.to_json(tmp_path / "pairs.jsonl")
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "tokenizer")  # apart: beside a Qwen2 model it would load as Qwen2's class
    trainer = train_with_trl(
        tmp_path / "trl",
        model,
        model,
        {"loss_type": "sigmoid"},
        data=(pairs, tokenizer()),
        gradient_accumulation_steps=2,
        warmup_steps=0,  # transformers begins a warm-up at 0
    )
    result = train(
        TrainConfig(
            model=str(tmp_path / "model"),
            tokenizer=str(tmp_path / "tokenizer"),
            dataset=str(tmp_path / "pairs.jsonl"),
            eval_fraction=0.0,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            adam_epsilon=ADAM_EPSILON,
            warmup_steps=0,
            max_steps=STEPS,
            per_device_batch_size=PAIRS,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_steps=0,
            progress_bar=False,
            output_dir=str(tmp_path / "ours"),
            cache_dir=str(tmp_path / "cache"),
        )
    )
    rows = [json.loads(line) for line in result.metrics_path.read_text().splitlines()]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(rows) == len(logs) == STEPS
    for ours, theirs in zip(rows, logs, strict=True):
        theirs["lr"] = theirs["learning_rate"]
        shared = {name: value for name, value in ours.items() if name in theirs and name != "epoch"}
        assert len(shared) == 10  # loss, grad_norm, lr, step, four rewards and two log-probabilities
        ties = float(theirs["rewards/margins"] == 0)  # the policy is still the reference
        assert_metrics_agree(shared, theirs, f"step {ours['step']}", ties)


@pytest.mark.parametrize(
    "difference", [{"beta": BETA * 1.001}, {"loss_weights": [0.8, 0.2, 1.001]}], ids=["beta", "sum"]
)
def test_the_comparison_notices_a_thousandth(tmp_path, difference):
    model = tiny_model()
    steps = train_with_trl(tmp_path, model, model, MPO).steps
    with pytest.raises(AssertionError, match="step 1"):
        replay(copy.deepcopy(model), model, steps, {**MPO, **difference})


def test_under_bf16_autocast_ours_is_closer_to_the_exact_loss(tmp_path):
    """Peaked logits lose up to 2^-9 of their size in TRL's head, which rounds them to bf16. Exact is fp64 arithmetic on
    the same hidden states and weights in bf16; a learning rate of 0 keeps the weights of all steps the same."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(3.5)  # logits of standard deviation 4
    reference = other_checkpoint(model)
    options = {"loss_type": "sigmoid"}
    steps = train_with_trl(tmp_path, model, reference, options, bf16=True, learning_rate=0.0).steps
    head, reference_head = LMHead.from_model(model), LMHead.from_model(reference)
    our_errors, their_errors = [], []
    for step in steps:
        labels = labels_of(step.batch)
        with torch.autocast("cpu", torch.bfloat16):
            ref_logps = reference_logps(reference_head, step.batch)
            hidden, _ = head.hidden_states(**inputs_of(step.batch))
            ref_hidden, _ = reference_head.hidden_states(**inputs_of(step.batch))
            ours = head.dpo_loss(hidden, labels, ref_logps, shift=True, beta=BETA)
        exact = exact_logps(hidden, model.lm_head.weight, labels)
        exact_ref = exact_logps(ref_hidden, reference.lm_head.weight, labels)
        exact_loss = dpo_loss(*exact.chunk(2), *exact_ref.chunk(2), beta=BETA).losses.mean()

        exact_values = torch.stack([exact_loss, *exact.view(2, -1).mean(1)])
        our_errors.append(torch.stack([ours.loss, *ours.logps.view(2, -1).mean(1)]) - exact_values)
        logged = [step.metrics[name] for name in ("loss", "logps/chosen", "logps/rejected")]
        their_errors.append(torch.tensor(logged, dtype=torch.float64) - exact_values)
    our_rms, their_rms = (torch.stack(errors).square().mean(0).sqrt() for errors in (our_errors, their_errors))
    print(f"rms error of loss, logps/chosen, logps/rejected: ours {our_rms.tolist()}, TRL {their_rms.tolist()}")
    assert (100 * our_rms < their_rms).all(), (our_rms, their_rms)


def exact_logps(hidden, weight, labels):
    logits = hidden.detach().bfloat16().double() @ weight.detach().bfloat16().double().T
    token_logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
    return token_logps.masked_fill(labels[:, 1:] == -100, 0.0).sum(1)
