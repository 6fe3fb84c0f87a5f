"""Prompts to evaluate with: requests as the OpenAI API takes them, each with its one right answer.

All is drawn from the side of the split that training never sees, from a seed of its own.
"""
import random

import skills

SEED = 77_000_001
RECALL_LENGTHS = [128, 256, 512, 1024, 1536, 2048]
# Filled up so far at most below the length that is asked for, in tokens.
SLACK = 16


def prompts(skill, count, encoder):
    """`count` of (request, expected answer); `skill` is a name of SKILLS."""
    rng = random.Random(f"{SEED} {skill}")
    return [SKILLS[skill](rng, encoder) for _ in range(count)]


def rendered(request, encoder):
    """The prompt's ids, as the chat template renders it."""
    said = [(message["role"], message["content"]) for message in request["messages"]]
    return encoder.prompt([("system", skills.SYSTEM), *said])


def request(turns):
    """`turns` are (role, text)."""
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def recall(length):
    def make(rng, encoder):
        facts = skills.Facts(rng, held_out=True)
        filler_share = rng.choice([0, 0.1, 0.3, 0.6])
        is_later = rng.random() < 0.5

        def asked(text, question):
            turns = [("user", text), ("assistant", "Noted."), ("user", question)] if is_later \
                else [("user", f"{text} {question}")]
            return request(turns)

        # Room for the marks, the system message and a question.
        sentences, room = [], length - 40
        while room > SLACK:
            told = None if rng.random() < filler_share else facts.tell()
            sentences.append(told or skills.filler(rng))
            room -= len(encoder.text(" " + sentences[-1]))
        question, answer = facts.question() or facts_of_one(rng, facts, sentences)
        made = asked(" ".join(sentences), question)
        while len(rendered(made, encoder)) <= length - SLACK:
            sentences.append(skills.filler(rng))
            made = asked(" ".join(sentences), question)
        while len(rendered(made, encoder)) > length:
            drop = next(i for i in reversed(range(len(sentences))) if sentences[i].split()[0] == "The" and
                        any(sentences[i].startswith(s[0].upper() + s[1:]) for s in skills.FILLER_SUBJECTS))
            del sentences[drop]
            made = asked(" ".join(sentences), question)
        return made, answer

    return make


def facts_of_one(rng, facts, sentences):
    """Filler alone was drawn: one fact goes somewhere into it."""
    sentences.insert(rng.randint(0, len(sentences)), facts.tell())
    return facts.question()


def small_talk(rng, encoder, turns):
    """Turns about other things, before or between."""
    facts, said = skills.Facts(rng, held_out=True), []
    for _ in range(turns):
        kind = rng.choice(["facts", "add", "sort", "copy"])
        if kind == "facts":
            said += [("user", skills.paragraph(rng, facts, rng.randint(2, 12), 0.3)), ("assistant", "Noted.")]
        else:
            turn = {"add": skills.arithmetic, "sort": skills.sorting, "copy": skills.copying}[kind](rng, True)
            said += [("user", turn[0]), ("assistant", turn[1])]
    return said


def one_turn(skill):
    def make(rng, encoder):
        question, answer = skill(rng, True)
        return request([*small_talk(rng, encoder, rng.choice([0, 0, 1, 2])), ("user", question)]), answer

    return make


def said(rng, encoder):
    talk, person = small_talk(rng, encoder, rng.choice([0, 1])), skills.Said(rng, held_out=True)
    for _ in range(rng.randint(2, 4)):
        told, acknowledged = person.tell()
        talk += [("user", told), ("assistant", acknowledged), *small_talk(rng, encoder, rng.choice([0, 1, 3]))]
    question, answer = person.question(rng)
    return request([*talk, ("user", question)]), answer


def lists(rng, encoder):
    turns = skills.lists(rng, True)
    talk = small_talk(rng, encoder, rng.choice([0, 0, 1, 2]))
    for question, answer in turns[:-1]:
        talk += [("user", question), ("assistant", answer)]
    return request([*talk, ("user", turns[-1][0])]), turns[-1][1]


def json_schema(rng, encoder):
    facts = skills.Facts(rng, held_out=True)
    text = skills.paragraph(rng, facts, rng.randint(2, 40), rng.choice([0, 0.3]))
    filled = facts.as_json()
    while filled is None:
        name = rng.choice(facts.names)
        text += "".join(" " + facts.tell_of(attribute, name) for attribute in skills.ATTRIBUTES
                        if (attribute, name) not in facts.known and skills.has_values(True, attribute, name))
        filled = facts.as_json()
    if rng.random() < 0.5:
        return request([("user", f"{text} {filled[0]}")]), filled[1]
    return request([("user", text), ("assistant", "Noted."), ("user", filled[0])]), filled[1]


SKILLS = {
    **{f"recall {length}": recall(length) for length in RECALL_LENGTHS},
    "earlier in the conversation": said,
    "copy": one_turn(skills.copying),
    "JSON list": one_turn(skills.json_list),
    "sort": one_turn(skills.sorting),
    "list": lists,
    "addition": one_turn(skills.arithmetic),
    "JSON": json_schema,
}
