"""The tokenizer, the special tokens and how a conversation becomes token ids.

`encode` gives the ids that the chat template and the tokenizer give together (evaluate.py checks it through
the running system).
"""
import pathlib
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import skills
import words

FOLDER = pathlib.Path(__file__).resolve().parent.parent
SPECIAL = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
BOS, END, PAD, SYSTEM, USER, ASSISTANT, TOOL = range(len(SPECIAL))
MARKUP = ["<tool_call>", "</tool_call>"]
ROLE = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL}
VOCAB = 1792
# Words with their space, single digits with theirs, single marks.
SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"


def vocabulary_text():
    """Every word with and without a space before it, and sentences for what is left of the table."""
    single = words.NAMES + words.CITIES + words.THINGS + words.COLOURS + words.TOPICS
    lines = [f"{word} {word}" for word in single for _ in range(60)]
    rng = random.Random(1)
    facts = skills.Facts(rng, held_out=False, backwards=True)
    for _ in range(400):
        facts.known.clear()
        facts.asked.clear()
        told = skills.paragraph(rng, facts, 6, 0.5)
        turns = [facts.question(), skills.sorting(rng, False), skills.arithmetic(rng, False), skills.copying(rng, False)]
        turns += skills.lists(rng, False) + list(skills.Said(rng, False).untold)
        filled = facts.as_json()
        turns += [filled] if filled else []
        tools = skills.tool_list(rng, "verb first")
        turns += [turn[1:] for turn in skills.tool_call(rng, False, tools)]
        lines += [skills.SYSTEM, told, skills.tools_text(tools, "verb first")] + [part for turn in turns for part in turn]
    return lines


def train():
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(MARKUP),
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(vocabulary_text(), trainer)
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in MARKUP])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", BOS)])
    assert [tokenizer.token_to_id(s) for s in SPECIAL] == list(range(len(SPECIAL)))
    return tokenizer


class Encoder:
    """Text to ids, one message at a time: special tokens separate messages before anything is merged."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def text(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def message(self, role, text):
        return [ROLE[role], *self.text(text), END]

    def prompt(self, messages):
        """As the chat template renders it with a generation prompt; messages are (role, text)."""
        ids = [BOS]
        for role, text in messages:
            ids += self.message(role, text)
        return ids + [ASSISTANT]
