"""The words that facts, lists and requests are made of, and which of their pairs training never sees.

Every word is short and common in the generated text, so the tokenizer learns it as one token.
"""
import hashlib

NAMES = """Ada Adam Alan Alice Amir Anna Arno Aziz Bea Ben Boris Carl Carol Clara Cyril Dana David Dora Edgar Elena
Elif Emil Emma Eric Esra Eva Farid Felix Finn Flora Frank Fred Gina Grace Greta Hana Harry Heidi Henry Hugo Ida Igor
Ines Irma Ivan Jack Jana Jane Jonas Jorge Julia Karl Kate Kenji Kira Lars Laura Lena Leo Lily Linda Lucas Luna Marco
Maria Maya Mei Mia Milan Mona Nadia Nils Nina Noah Nora Olga Omar Oscar Otto Paul Pedro Peter Petra Quinn Rana Rita
Robin Rosa Ruben Sara Selma Simon Sofia Sven Tara Theo Tina Tomas Uma Vera Victor Wanda Yara Yusuf Zoe""".split()

CITIES = """Accra Athens Basel Berlin Bern Bogota Boston Cairo Cork Dakar Delhi Dublin Genoa Geneva Hanoi Havana
Kyoto Lagos Lima Lisbon London Lyon Madrid Malmo Miami Milano Moscow Mumbai Nairobi Naples Nice Osaka Oslo Paris
Porto Prague Quito Riga Rome Seoul Sofia Sydney Tokyo Tunis Turin Vienna Warsaw York Zagreb Zurich""".split()

THINGS = """apple arrow axe badge ball banana bank basket bell bike boat book bottle bowl box bread brush bucket
camera candle cap carpet chair cheese clock coat comb cup desk dish door drum egg fan flag flute fork glass glove
guitar hammer harp hat helmet jacket jar kettle key kite knife ladder lamp lemon letter lock map mask melon mirror
needle onion orange oven paint pan pear pen piano pillow plate potato purse radio rake ring rope ruler saddle scarf
shell shirt shoe shovel soap sofa spoon stamp stone stool table tent ticket towel train tray truck umbrella vase
violin wagon wallet watch wheel whistle window""".split()

COLOURS = "amber beige black blue bronze brown coral cream gold gray green indigo ivory jade lilac lime maroon mint \
navy olive orange peach pink plum purple red rose ruby silver tan teal violet white yellow".split()

TOPICS = "weather time price news traffic menu map score".split()
VERBS = "get find read check fetch show".split()

LETTERS = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()
ORDINALS = "first second third fourth fifth sixth".split()

FILLER_SUBJECTS = "the river,the road,the garden,the market,the harbor,the school,the old bridge,the museum,\
the station,the forest,the bakery,the library".split(",")
FILLER_VERBS = "is quiet,is closed,is busy,looks empty,was painted,opens early,was repaired,is far away".split(",")
FILLER_ENDS = "today,in winter,this week,every morning,at night,again,since spring,for now,on Sunday,after the rain".split(",")

ONE_IN_HELD_OUT = 10


def is_held_out(*parts):
    """Whether evaluation alone may put these together; fixed for ever by the spelling."""
    digest = hashlib.blake2b("|".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % ONE_IN_HELD_OUT == 0
