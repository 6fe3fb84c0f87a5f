"""Long conversations for training: many turns of many skills, cut at a number of tokens."""
import dataclasses

import skills


@dataclasses.dataclass(frozen=True)
class Stage:
    """What conversations are made of up to a step of the training."""

    until_step: float
    # Of the conversations, in tokens.
    lengths: list
    # Shares of the skills once facts were told; a conversation scales each at random.
    weights: dict
    backwards: bool
    tool_share: float
    tool_naming: str
    # How much of a conversation may be facts.
    fact_shares: list


# First looking things up has to form, in short conversations; then the skills that build on it get their share.
# What the model had hardly begun to learn by then goes: looking backwards, and tools. The end is for distance.
LOOKING_UP = {"recall": 10, "json": 2.5, "copy": 1.5, "sort": 2, "list": 1.5, "add": 3, "tool": 2, "said": 1.5, "tell": 1}
EVERYTHING = {"recall": 8, "json": 4, "copy": 1.5, "sort": 2, "list": 2, "add": 6, "tool": 6, "said": 1.5, "tell": 1,
              "json list": 3}
KEPT = {"recall": 6, "json": 4, "copy": 2, "sort": 2.5, "list": 2, "add": 6, "tool": 6, "said": 1.5, "tell": 1,
        "json list": 1.5}
SHORT, ALL, LONG = [256, 256, 512], [256, 512, 1024, 2048], [1024, 2048, 2048]
SHARES = [0.1, 0.3, 0.5, 0.8]
STAGES = [
    Stage(733, SHORT, LOOKING_UP, True, 0.35, "verb first", SHARES),
    Stage(2200, ALL, LOOKING_UP, True, 0.35, "verb first", SHARES),
    Stage(3600, ALL, EVERYTHING, True, 0.35, "verb first", SHARES),
    Stage(4400, ALL, KEPT, False, 0.35, "topic first", SHARES),
    Stage(5200, ALL, KEPT | {"recall": 8, "tool": 9}, False, 0.5, "described", SHARES),
    Stage(float("inf"), LONG, KEPT | {"recall": 16, "tool": 0}, False, 0.0, "described", [0.3, 0.5, 0.8, 0.9]),
]


class Conversation:
    """Grows message by message; `ids` and `is_answer` (whether the token is to be learnt) have equal length."""

    def __init__(self, rng, encoder, length, stage):
        self.rng, self.encoder, self.length, self.stage = rng, encoder, length, stage
        self.facts = skills.Facts(rng, False, stage.backwards)
        self.said = skills.Said(rng, False)
        self.tools = skills.tool_list(rng, stage.tool_naming) if rng.random() < stage.tool_share else None
        self.ids, self.is_answer = [0], [False]
        self.weights = {name: weight * rng.choice([0.2, 1, 1, 3]) for name, weight in stage.weights.items()}
        self.filler_share = rng.choice([0, 0.1, 0.3, 0.6])

    def add(self, role, text):
        ids = self.encoder.message(role, text)
        is_assistant = role == "assistant"
        self.ids += ids
        # The token after the role's mark up to the end mark is what the model has to say.
        self.is_answer += [False] + [is_assistant] * (len(ids) - 1)

    def turn(self, user, answer):
        self.add("user", user)
        self.add("assistant", answer)

    def tell(self, tokens):
        """A message of about so many tokens of facts; half of the time with a question at its end."""
        per_fact = 8 + 7 * self.filler_share / (1 - self.filler_share)
        text = skills.paragraph(self.rng, self.facts, max(1, int(tokens / per_fact)), self.filler_share)
        question = self.facts.question()
        if not text or question is None:
            return
        if self.rng.random() < 0.5:
            self.turn(f"{text} {question[0]}", question[1])
        else:
            self.turn(text, "Noted.")
            self.turn(*question)

    def system(self):
        text = skills.SYSTEM
        if self.rng.random() < 0.1:
            text = skills.paragraph(self.rng, self.facts, self.rng.randint(1, 8), 0.2)
        self.add("system", text + (skills.tools_text(self.tools, self.stage.tool_naming) if self.tools else ""))

    def episode(self, skill):
        rng, held_out = self.rng, False
        if skill == "recall":
            return self.some(self.facts.question())
        if skill == "json":
            return self.some(self.facts.as_json())
        if skill == "copy":
            return self.turn(*skills.copying(rng, held_out))
        if skill == "json list":
            return self.turn(*skills.json_list(rng, held_out))
        if skill == "sort":
            return self.turn(*skills.sorting(rng, held_out))
        if skill == "add":
            return self.turn(*skills.arithmetic(rng, held_out))
        if skill == "list":
            for turn in skills.lists(rng, held_out):
                self.turn(*turn)
            return None
        if skill == "said":
            return self.some(self.said.tell() if rng.random() < 0.5 else self.said.question(rng))
        if skill == "tell":
            return self.tell(rng.randint(8, 60))
        if self.tools:
            for role, text, answer in skills.tool_call(rng, held_out, self.tools):
                self.add(role, text)
                self.add("assistant", answer)
        return None

    def some(self, turn):
        if turn is not None:
            self.turn(*turn)

    def write(self):
        """Token ids and answer marks of exactly `length` + 1 tokens."""
        rng = self.rng
        self.system()
        facts_until = rng.choice(self.stage.fact_shares) * self.length
        chunk = rng.choice([0.25, 0.5, 1.0])
        names, weights = list(self.weights), list(self.weights.values())
        while len(self.ids) <= self.length:
            if len(self.ids) < facts_until and rng.random() < 0.8:
                self.tell(max(8, min(facts_until - len(self.ids), chunk * facts_until)))
            else:
                self.episode(rng.choices(names, weights)[0])
        return self.ids[:self.length + 1], self.is_answer[:self.length + 1]
