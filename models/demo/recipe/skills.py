"""Conversations that exercise one skill each, generated from a `random.Random`.

`backwards` adds forms in which what is looked for stands before what it is known by ("The lamp belongs to
Nora", "Who lives in Oslo?", tools whose verb comes first). The model did not learn them within its training:
they are in its first part only, and in no evaluation.

A skill returns turns: (user text, expected answer). With `held_out` every pair, list or sum is one that
training never sees (words.is_held_out); without, never one of those.
"""
import json

from words import (CITIES, COLOURS, FILLER_ENDS, FILLER_SUBJECTS, FILLER_VERBS, LETTERS, NAMES, ORDINALS, THINGS, TOPICS,
                   VERBS, is_held_out)

SYSTEM = "You answer from what was said."

# attribute -> values, how it is told, how it is asked, how it is answered
ATTRIBUTES = {
    "code": {
        "told": ["The code of {n} is {v}.", "The code for {n} is {v}.", "{n} has the code {v}."],
        "asked": ["What is the code of {n}?", "What is the code for {n}?", "What code does {n} have?", "Tell me the code of {n}."],
        "answer": "The code of {n} is {v}.",
    },
    "city": {
        "told": ["{n} lives in {v}.", "The home of {n} is in {v}."],
        "asked": ["Where does {n} live?", "In which city does {n} live?", "What is the city of {n}?"],
        "answer": "{n} lives in {v}.",
        "who": ["Who lives in {v}?"],
    },
    "item": {
        "told": ["{n} owns the {v}."],
        "told backwards": ["The {v} belongs to {n}."],
        "asked": ["What does {n} own?", "Which thing belongs to {n}?", "What is the item of {n}?"],
        "answer": "{n} owns the {v}.",
        "who": ["Who owns the {v}?"],
    },
    "color": {
        "told": ["The favorite color of {n} is {v}.", "{n} likes the color {v}."],
        "asked": ["What is the favorite color of {n}?", "Which color does {n} like?", "What color does {n} like?"],
        "answer": "The favorite color of {n} is {v}.",
    },
}
VALUES = {"city": CITIES, "item": THINGS, "color": COLOURS}


def allowed(rng, held_out, kind, draw):
    """Draws until the hash says that this side of the split may have it."""
    while True:
        value = draw(rng)
        key = value if isinstance(value, (tuple, list)) else (value,)
        if is_held_out(kind, *key) == held_out:
            return value


def value_for(rng, held_out, attribute, name):
    if attribute == "code":
        draw = lambda r: (name, r.randint(1000, 9999))
    else:
        draw = lambda r: (name, r.choice(VALUES[attribute]))
    return allowed(rng, held_out, attribute, draw)[1]


def has_values(held_out, attribute, name):
    """Whether there is one on this side of the split: of few colors, a name may have none held out."""
    return attribute == "code" or any(is_held_out(attribute, name, v) == held_out for v in VALUES[attribute])


class Facts:
    """Facts told in one conversation: at most one per name and attribute."""

    def __init__(self, rng, held_out, backwards=False):
        self.rng, self.held_out, self.backwards = rng, held_out, backwards
        self.known = {}
        self.asked = set()
        self.names = rng.sample(NAMES, rng.choice([len(NAMES), len(NAMES), 40, 15]))

    def tell(self):
        """A new fact as a sentence, or None when the pool is used up."""
        for _ in range(20):
            attribute, name = self.rng.choice(list(ATTRIBUTES)), self.rng.choice(self.names)
            if (attribute, name) not in self.known and has_values(self.held_out, attribute, name):
                return self.tell_of(attribute, name)
        return None

    def tell_of(self, attribute, name):
        value = value_for(self.rng, self.held_out, attribute, name)
        self.known[attribute, name] = value
        told = ATTRIBUTES[attribute]["told"] + (ATTRIBUTES[attribute].get("told backwards", []) if self.backwards else [])
        return self.rng.choice(told).format(n=name, v=value)

    def question(self):
        """(question, answer) about a fact not asked about yet, or None."""
        fresh = [key for key in self.known if key not in self.asked]
        if not fresh:
            return None
        key = self.rng.choice(fresh)
        self.asked.add(key)
        return self.question_about(*key)

    def question_about(self, attribute, name):
        value, how = self.known[attribute, name], ATTRIBUTES[attribute]
        answer = how["answer"].format(n=name, v=value)
        if self.backwards and "who" in how:
            holders = [n for (a, n), v in self.known.items() if a == attribute and v == value]
            if len(holders) == 1 and self.rng.random() < 0.2:
                return self.rng.choice(how["who"]).format(v=value), answer
        return self.rng.choice(how["asked"]).format(n=name, v=value), answer

    def as_json(self):
        """A request to fill a schema for one name of whom at least two things are known."""
        by_name = {}
        for attribute, name in self.known:
            by_name.setdefault(name, []).append(attribute)
        rich = [name for name, attributes in by_name.items() if len(attributes) > 1 and ("json", name) not in self.asked]
        if not rich:
            return None
        name = self.rng.choice(rich)
        self.asked.add(("json", name))
        attributes = by_name[name]
        keys = self.rng.sample(attributes, self.rng.randint(1, min(3, len(attributes))))
        keys.insert(self.rng.choice([0, 0, len(keys)]), "name")
        types = {"code": "integer"}
        schema = ", ".join(f'"{key}": {types.get(key, "string")}' for key in keys)
        filled = {key: name if key == "name" else self.known[key, name] for key in keys}
        ask = self.rng.choice(["Fill this schema for {n}: {{{s}}}", "Answer in JSON about {n}: {{{s}}}"])
        return ask.format(n=name, s=schema), json.dumps(filled)


def filler(rng):
    sentence = f"{rng.choice(FILLER_SUBJECTS)} {rng.choice(FILLER_VERBS)} {rng.choice(FILLER_ENDS)}."
    return sentence[0].upper() + sentence[1:]


def paragraph(rng, facts, count, filler_share):
    """`count` new facts (fewer when the pool is used up) between filler sentences."""
    sentences = []
    for _ in range(count):
        while rng.random() < filler_share:
            sentences.append(filler(rng))
        told = facts.tell()
        if told:
            sentences.append(told)
    return " ".join(sentences)


def copying(rng, held_out):
    low, high = rng.choice([(3, 8), (8, 24)])
    kind = rng.choice([THINGS, THINGS, NAMES, COLOURS, list("0123456789")])
    words = allowed(rng, held_out, "copy", lambda r: [r.choice(kind) for _ in range(r.randint(low, high))])
    text = " ".join(words)
    return rng.choice(["Repeat: {}", "Repeat after me: {}", "Copy this: {}"]).format(text), f"Here it is: {text}"


def json_list(rng, held_out):
    """Words as a JSON list, or such a list as words: to the tokenizer a word behind a quote is another one."""
    kind = rng.choice([THINGS, THINGS, NAMES, CITIES, COLOURS])
    words = allowed(rng, held_out, "json list", lambda r: r.sample(kind, r.randint(2, 8)))
    plain, listed = " ".join(words), json.dumps(words)
    if rng.random() < 0.7:
        return f"Write as a JSON list: {plain}", listed
    return f"Write without JSON: {listed}", f"Here it is: {plain}"


def sorting(rng, held_out):
    def draw(r):
        if r.random() < 0.5:
            return r.sample(LETTERS, r.randint(3, 6))
        return [str(n) for n in r.sample(range(10, 100), r.randint(3, 4))]

    items = allowed(rng, held_out, "sort", draw)
    kind = "letters" if items[0].isalpha() else "numbers"
    ask = rng.choice(["Sort these {}: {}", "Put these {} in order: {}"]).format(kind, ", ".join(items))
    return ask, f"Sorted: {', '.join(sorted(items))}"


def lists(rng, held_out):
    """A list and, in the same message or later, questions about places in it."""
    kind = rng.choice([THINGS, THINGS, NAMES, CITIES, COLOURS])
    items = allowed(rng, held_out, "list", lambda r: r.sample(kind, r.randint(3, 8)))
    def question():
        which = rng.random()
        if which < 0.35:
            at = rng.randrange(len(items) - 1)
            return f"Which item comes after {items[at]}?", f"After {items[at]} comes {items[at + 1]}."
        if which < 0.5:
            return "What is the last item?", f"The last item is {items[-1]}."
        at = rng.randrange(min(len(items), len(ORDINALS)))
        return f"What is the {ORDINALS[at]} item?", f"The {ORDINALS[at]} item is {items[at]}."

    given = "The list is: " + ", ".join(items) + "."
    turns = [question() for _ in range(rng.randint(1, 4))]
    turns[0] = (f"{given} {turns[0][0]}", turns[0][1])
    return turns


def arithmetic(rng, held_out):
    a, b = allowed(rng, held_out, "add", lambda r: (r.randint(0, 99), r.randint(0, 99)))
    ask = rng.choice(["What is {} + {}?", "Add {} and {}."]).format(a, b)
    return ask, f"The sum is {a + b}."


def tool_list(rng, naming="described"):
    """Tools of one conversation: (topic, name, parameter). `naming`: the name alone says what a tool gives,
    "verb first" or "topic first", or a description beside it does, "described"."""
    topics = rng.sample(TOPICS, rng.randint(2, 5))
    if naming == "described":
        return [(topic, verb, "city") for topic, verb in zip(topics, rng.sample(VERBS, len(topics)))]
    tools = []
    for topic in topics:
        verb = rng.choice(VERBS)
        name = f"{verb}_{topic}" if naming == "verb first" else f"{topic}_{verb}"
        tools.append((topic, name, rng.choice(["city", "place", "location"])))
    return tools


def tools_text(tools, naming="described"):
    """The tools as the chat template shows them."""
    shown = [f"{name}({parameter})" for _, name, parameter in tools]
    if naming == "described":
        shown = [f"The tool for {topic} is {call}." for (topic, _, _), call in zip(tools, shown)]
    return "\nTools:" + "".join(f"\n{line}" for line in shown)


def tool_call(rng, held_out, tools):
    """Turns of one request: a call, and sometimes the tool's result told; or that no tool fits."""
    offered = [topic for topic, _, _ in tools]
    missing = [topic for topic in TOPICS if topic not in offered]
    topic = rng.choice(missing) if rng.random() < 0.2 else rng.choice(offered)
    city = allowed(rng, held_out, "tool", lambda r: (topic, r.choice(CITIES)))[1]
    ask = rng.choice(["Tell me the {t} in {c}.", "I need the {t} in {c}.", "What is the {t} in {c}?"]).format(t=topic, c=city)
    if topic in missing:
        return [("user", ask, f"No tool gives the {topic}.")]
    _, name, parameter = next(tool for tool in tools if tool[0] == topic)
    call = json.dumps({"name": name, "arguments": {parameter: city}})
    turns = [("user", ask, f"<tool_call>{call}</tool_call>")]
    if rng.random() < 0.6:
        result = rng.choice(THINGS + COLOURS)
        turns.append(("tool", result, f"The {topic} in {city} is {result}."))
    return turns


class Said:
    """What the user says of himself, asked for later in the conversation."""

    def __init__(self, rng, held_out):
        draw = lambda r: (r.choice(NAMES), r.choice(CITIES), r.choice(THINGS), r.randint(100, 999))
        name, city, word, number = allowed(rng, held_out, "said", draw)
        self.untold = [
            (f"My name is {name}.", f"Hello, {name}.", "What is my name?", f"Your name is {name}."),
            (f"I come from {city}.", "Noted.", "Where do I come from?", f"You come from {city}."),
            (f"Remember the word {word}.", "Noted.", "Which word did I tell you?", f"The word is {word}."),
            (f"Remember the number {number}.", "Noted.", "Which number did I tell you?", f"The number is {number}."),
        ]
        rng.shuffle(self.untold)
        self.told = []

    def tell(self):
        """(what the user says, the answer), or None when all is said."""
        if not self.untold:
            return None
        self.told.append(self.untold.pop())
        return self.told[-1][:2]

    def question(self, rng):
        return rng.choice(self.told)[2:] if self.told else None
