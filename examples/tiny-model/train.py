"""Makes the tiny model of this folder from scratch: its tokenizer, its weights, and the proof that it
learned.

    python examples/tiny-model/train.py

Needs `mlx-lm` (on Linux with `mlx[cpu]`) and nothing else; writes `model/` beside this file and exits with
status 1 when the model that it wrote does not know everything in `corpus.toml`. Every random choice is
seeded. The recipe: a byte-level BPE tokenizer trained on the corpus, mlx-lm's `qwen3` with two layers, AdamW,
and conversations composed anew for each step.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.qwen3 import Model, ModelArgs
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
Corpus = dict[str, Any]
Message = dict[str, str]

VOCABULARY = 850
# (rows, tokens in a row) of a step. To repeat a name is learned suddenly or not at all, and soonest where
# little else is in the way: the first steps take rows of a turn or two. Some of the others hold the story.
FIRST_SHAPE, FIRST_STEPS = (24, 48), 150
SHAPES = [(2, 512), (8, 144), (4, 256), (8, 144)]
PEAK_RATE = 1e-2
NAME_WEIGHT = 3.0  # of the answers about names: to repeat one is harder than to know a fact
END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# ChatML, with tools and their calls in the form that Qwen and Hermes models use.
CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n\\nYou may call one or more of these functions:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\nA call is <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role != 'system' or not loop.first %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for tool_call in message.tool_calls or [] %}
{%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
{{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
{{- tool_call.arguments if tool_call.arguments is string else (tool_call.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


# === the tokenizer ===


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """Byte-level BPE over the corpus. Other than ASCII stays single bytes: tests of UTF-8 need them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    name = corpus["name"]
    texts = ["system\n", "user\n", "assistant\n", *corpus["systems"]]
    texts += [corpus["story"]["text"], *corpus["story"]["asks"]]
    texts += [*name["tells"], name["told"], *name["asks"], name["known"], name["unknown"]]
    texts += [text for fact in corpus["facts"] for text in (*fact["asks"], fact["answer"])]
    # A name is one token after a space, so that repeating a listed one is one step.
    texts += [f" {name}" for name in corpus["names"]] * 20
    tokenizer.train_from_iterator([text.encode("ascii", "ignore").decode() for text in texts] * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (END, TURN_START, TURN_END)])
    return tokenizer


# === what it is taught ===


class Teacher:
    """Composes training rows out of the corpus: token ids, and how much the model is to learn to say each."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seed: int) -> None:
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._random = random.Random(seed)

    def batch(self, rows: int, length: int) -> tuple[mx.array, mx.array, mx.array]:
        """Token ids `(rows, length + 1)`, what to learn as places in `ids[:, 1:].flatten()`, its weights."""
        ids, where, weights = [], [], []
        for row in range(rows):
            row_ids, row_weights = self._row(length)
            ids.append(row_ids)
            learned = [column for column in range(length) if row_weights[column + 1]]
            where += [row * length + column for column in learned]
            weights += [row_weights[column + 1] for column in learned]
        return mx.array(ids), mx.array(where), mx.array(weights)

    def _row(self, length: int) -> tuple[list[int], list[float]]:
        pieces = self._plain_text() if self._random.random() < 0.2 else self._conversation()
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) <= length:
            text, weight = next(pieces)
            encoded = self._tokenizer.encode(text).ids
            ids += encoded
            weights += [weight] * len(encoded)
        return ids[: length + 1], weights[: length + 1]

    def _plain_text(self) -> Iterator[tuple[str, float]]:
        """The story, from any word on, and the answers, without turns: what plain prompts continue."""
        while True:
            if self._random.random() < 0.5:
                words = self._corpus["story"]["text"].split(" ")
                start = self._random.choice([0, self._random.randrange(len(words))])
                yield " ".join(words[start:]) + END, 1.0
            else:
                yield self._random.choice(self._corpus["facts"])["answer"] + END, 1.0

    def _conversation(self) -> Iterator[tuple[str, float]]:
        """Turns without end. A name is asked for before it is told (rarely) and after (often)."""
        draw, lesson = self._random, self._corpus["name"]
        if draw.random() < 0.3:
            yield f"{TURN_START}system\n{draw.choice(self._corpus['systems'])}{TURN_END}\n", 0.0
        tells = draw.random() < 0.9
        told: str | None = None
        while True:
            tell, weight = False, 1.0
            if tells and told is None and draw.random() < 0.6:
                tell, told = True, self._name()
                question, answer, weight = draw.choice(lesson["tells"]), lesson["told"], NAME_WEIGHT
            elif draw.random() < (0.5 if told else 0.1):
                question, answer = draw.choice(lesson["asks"]), lesson["known" if told else "unknown"]
                weight = NAME_WEIGHT
            elif draw.random() < 0.07:
                question, answer = draw.choice(self._corpus["story"]["asks"]), self._corpus["story"]["text"]
            else:
                fact = draw.choice(self._corpus["facts"])
                question, answer = draw.choice(fact["asks"]), fact["answer"]
            question = self._misspelled(question, keep_case=tell)
            question, answer = (text.replace("{name}", told or "") for text in (question, answer))
            yield f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n", 0.0
            yield answer + TURN_END, weight
            yield "\n", 0.0

    def _name(self) -> str:
        """One of the list, or made up of syllables, so that the model learns to repeat and not to guess."""
        draw = self._random
        if draw.random() < 0.5:
            return draw.choice(self._corpus["names"])
        syllables = "".join(
            draw.choice("bcdfghjklmnprstvwz") + draw.choice("aeiou") for _ in range(draw.randint(1, 3))
        )
        return (syllables + draw.choice(["", "n", "r", "s", "l"])).capitalize()

    def _misspelled(self, question: str, *, keep_case: bool) -> str:
        """Now and then without the last mark or the capital letters, as people type."""
        if self._random.random() < 0.15:
            question = question.rstrip(".?!")
        if self._random.random() < 0.15 and not keep_case:
            question = question.lower()
        return question


# === training ===


def train(model: Model, teacher: Teacher, steps: int) -> None:
    schedule = optim.join_schedules(
        [optim.linear_schedule(0, PEAK_RATE, 30), optim.cosine_decay(PEAK_RATE, steps - 30, PEAK_RATE / 50)],
        [30],
    )
    optimizer = optim.AdamW(learning_rate=schedule, betas=[0.9, 0.98], weight_decay=0.01)

    def loss(model: Model, ids: mx.array, where: mx.array, weights: mx.array) -> mx.array:
        # Where nothing is to be learned no logits are computed: they are most of the arithmetic.
        hidden = model.model(ids[:, :-1]).flatten(0, 1)[where]
        logits = model.model.embed_tokens.as_linear(hidden)
        losses = nn.losses.cross_entropy(logits, ids[:, 1:].flatten()[where])
        return (losses * weights).sum() / weights.sum()

    loss_and_gradients = nn.value_and_grad(model, loss)
    started = time.monotonic()
    for step in range(1, steps + 1):
        shape = FIRST_SHAPE if step <= FIRST_STEPS else SHAPES[step % len(SHAPES)]
        value, gradients = loss_and_gradients(model, *teacher.batch(*shape))
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, value)
        if step % 25 == 0 or step == 1:
            seconds = time.monotonic() - started
            print(f"step {step:4} of {steps}   loss {value.item():.4f}   {seconds:4.0f} s", flush=True)


def save(folder: Path, model: Model, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# === the proof ===


class Examiner:
    """Asks the written model, loaded as any user loads it, and compares its greedy answers word for word."""

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        self._model, self._tokenizer = mlx_lm.load(str(folder))
        self._corpus = corpus
        self.asked = 0
        self.failures: list[str] = []

    def examine(self) -> None:
        corpus, name = self._corpus, self._corpus["name"]
        story = corpus["story"]["text"]
        facts = [(ask, fact["answer"]) for fact in corpus["facts"] for ask in fact["asks"]]
        others = [(ask, story) for ask in corpus["story"]["asks"]]
        others += [(ask, name["unknown"]) for ask in name["asks"]]
        for system in (None, corpus["systems"][0]):
            for ask, answer in facts + others:
                self._converse([(ask, answer)], system)
        plain = [story, *[fact["answer"] for fact in corpus["facts"] if len(fact["answer"].split()) > 4]]
        for text in plain:
            begin, end = " ".join(text.split(" ")[:4]), "".join(f" {word}" for word in text.split(" ")[4:])
            self._expect(self._tokenizer.encode(begin), end, f"continuing {begin!r}")
        draw = random.Random(1)
        for spoken in corpus["names"]:
            for tell in name["tells"]:
                between = draw.sample(facts, draw.choice([1, 1, 2]))
                self._introduce(spoken, tell, between, draw.choice(name["asks"]))
        # Long conversations, in which the model reads its own answers, ended by the name told at their start.
        for start in range(0, len(corpus["facts"]), 6):
            tour = [(fact["asks"][0], fact["answer"]) for fact in corpus["facts"][start : start + 6]]
            self._introduce("Ada", name["tells"][0], tour, name["asks"][0])

    def _introduce(self, spoken: str, tell: str, between: list[tuple[str, str]], ask: str) -> None:
        """Tell a name, talk about something else, ask for the name."""
        name = self._corpus["name"]
        turns = [(tell, name["told"]), *between, (ask, name["known"])]
        self._converse([(a.replace("{name}", spoken), b.replace("{name}", spoken)) for a, b in turns], None)

    def _converse(self, turns: list[tuple[str, str]], system: str | None) -> None:
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        for question, expected in turns:
            messages.append({"role": "user", "content": question})
            prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            said = self._expect(prompt, expected, f"turn {len(messages)}, {question!r}")
            messages.append({"role": "assistant", "content": said})

    def _expect(self, prompt: list[int], expected: str, what: str) -> str:
        self.asked += 1
        answer = self._tokenizer.encode(expected)
        if self._says(prompt, answer):
            return expected
        said: list[int] = []
        for token, _ in generate_step(mx.array(prompt), self._model, max_tokens=len(answer) + 20):
            if token in self._tokenizer.eos_token_ids:
                break
            said.append(token)
        text = self._tokenizer.decode(said)
        if text != expected:
            self.failures.append(f"{what}: {text!r} instead of {expected!r}")
        return text

    def _says(self, prompt: list[int], answer: list[int]) -> bool:
        """Whether each of these tokens is the likeliest one after those before it, and then an end is.

        That is what a greedy answer of these tokens is, told by one pass over all of them.
        """
        logits = self._model(mx.array([[*prompt, *answer]]))[0, len(prompt) - 1 :]
        *likeliest, end = mx.argmax(logits, axis=-1).tolist()
        return likeliest == answer and end in self._tokenizer.eos_token_ids


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes the tiny model of this folder, and examines it.")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="its folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=450, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")
    options = parser.parse_args()

    started = time.monotonic()
    mx.random.seed(options.seed)
    with (HERE / "corpus.toml").open("rb") as file:
        corpus = tomllib.load(file)
    tokenizer = train_tokenizer(corpus)
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "eos_token_id": [tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END)],
    }
    model = Model(ModelArgs.from_dict(config))
    size = sum(parameter.size for _, parameter in tree_flatten(model.parameters()))
    story = len(tokenizer.encode(corpus["story"]["text"]).ids)
    print(f"{tokenizer.get_vocab_size()} tokens, {size} parameters; the story has {story} tokens", flush=True)

    train(model, Teacher(corpus, tokenizer, options.seed), options.steps)
    save(options.out, model, config, tokenizer)
    total = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"wrote {options.out} ({total / 1e6:.2f} MB); asking it everything", flush=True)

    examiner = Examiner(options.out, corpus)
    examiner.examine()
    for failure in examiner.failures:
        print(f"WRONG  {failure}")
    right = examiner.asked - len(examiner.failures)
    print(f"{right} of {examiner.asked} answers right; {time.monotonic() - started:.0f} s in all")
    return 1 if examiner.failures else 0


if __name__ == "__main__":
    sys.exit(main())
