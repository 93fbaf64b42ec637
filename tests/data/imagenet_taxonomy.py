"""Make `imgbatch/models/imagenet_taxonomy.csv` from WordNet 3.0: the levels of ImageNet's 1,000 classes.

    apt-get install wordnet-base
    python -m tests.data.imagenet_taxonomy /usr/share/wordnet > imgbatch/models/imagenet_taxonomy.csv

WordNet says what lies below what; which of its nodes are levels, and what they are called, is chosen here, for people: four
levels, "animal" > "mammal" > "cat" > "tabby", instead of up to 17. A class takes the nearest of the chosen nodes above it.
`GROUP_OF` and `KIND_OF` hold the classes for which WordNet has no natural node, or a misleading one: its "mosquito net" is
a covering, and its "cup" a drink. A class without a kind is its own.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from imgbatch.models.imagenet import imagenet_labels, imagenet_synsets

LEVELS = ("label", "kind", "group", "domain")

# domain: group: the WordNet nodes, by their first word, or by their number where other nodes share it.
GROUPS = {
    "animal": {
        "mammal": ["mammal"],
        "bird": ["bird"],
        "reptile": ["reptile"],
        "amphibian": ["n01627424"],
        "fish": ["n02512053"],
        "insect": ["insect"],
        "arachnid": ["arachnid"],
        "crustacean": ["crustacean"],
        "mollusk": ["mollusk"],
        "other invertebrate": ["invertebrate"],
    },
    "person": {"person": ["person"]},
    "plant": {"flower": ["flower"], "nut or berry": ["reproductive structure"], "other plant": []},
    "fungus": {"fungus": ["fungus"]},
    "food": {
        "fruit": ["edible fruit"],
        "vegetable": ["vegetable"],
        "bread": ["bread"],
        "dessert": ["dessert"],
        "meal": ["n07557434", "entree"],
        "drink": ["beverage"],
        "sauce": ["condiment"],
    },
    "vehicle": {
        "land vehicle": ["vehicle", "public transport"],
        "train": ["train", "locomotive", "n02959942"],
        "boat or ship": ["n04530566"],
        "aircraft": ["aircraft", "spacecraft"],
    },
    "object": {
        "clothing": ["clothing", "n03380867"],
        "accessory": [],
        "weapon or armor": ["weapon", "armor", "armor plate"],
        "musical instrument": ["musical instrument"],
        "furniture": ["furniture"],
        "furnishing": ["furnishing"],
        "container": ["container"],
        "kitchenware": ["kitchen utensil", "tableware"],
        "appliance": ["appliance"],
        "electronics": ["electronic equipment", "computer", "peripheral", "television"],
        "tool": ["tool", "implement"],
        "measuring instrument": ["n03574816"],
        "sports equipment": ["sports equipment", "game equipment"],
        "toy or amusement": ["plaything"],
        "machine or machine part": ["n03699975"],
        "textile": ["fabric"],
        "cosmetics": ["toiletry"],
        "medical or laboratory item": [],
        "paper or stationery": [],
        "sign": [],
        "light": [],
        "hardware": [],
        "other object": ["device", "covering"],
    },
    "structure": {
        "building": ["building", "dwelling", "fortification"],
        "shop": ["place of business"],
        "part of a building": ["roof"],
        "barrier": ["n02796623"],
        "bridge": ["bridge"],
        "monument": ["memorial"],
        "other structure": ["structure"],
    },
    "landscape": {"landform": ["geological formation"]},
}

# kind: the WordNet nodes
KINDS = {
    "dog": ["dog"],
    "cat": ["domestic cat"],
    "wildcat": ["wildcat"],
    "big cat": ["big cat"],
    "fox": ["fox"],
    "wolf": ["wolf"],
    "wild dog": ["wild dog"],
    "bear": ["bear"],
    "panda": ["procyonid"],
    "mongoose": ["viverrine"],
    "monkey": ["monkey"],
    "ape": ["ape"],
    "lemur": ["lemur"],
    "whale or dolphin": ["whale"],
    "seal": ["seal"],
    "elephant": ["elephant"],
    "horse": ["horse"],
    "pig": ["swine"],
    "cow or buffalo": ["bovid"],
    "sheep": ["sheep", "wild sheep"],
    "goat": ["goat"],
    "antelope": ["antelope"],
    "camel": ["camel"],
    "rabbit or hare": ["leporid"],
    "squirrel": ["squirrel"],
    "kangaroo": ["kangaroo"],
    "songbird": ["oscine"],
    "bird of prey": ["bird of prey"],
    "owl": ["owl"],
    "game bird": ["game bird"],
    "parrot": ["parrot"],
    "duck": ["duck"],
    "stork": ["stork"],
    "heron": ["heron"],
    "shorebird": ["shorebird"],
    "penguin": ["penguin"],
    "snake": ["snake"],
    "lizard": ["lizard"],
    "turtle": ["turtle"],
    "crocodile or alligator": ["crocodilian reptile"],
    "dinosaur": ["dinosaur"],
    "salamander": ["salamander"],
    "frog": ["frog"],
    "shark": ["shark"],
    "ray": ["ray"],
    "beetle": ["beetle"],
    "butterfly": ["butterfly"],
    "dragonfly": ["odonate"],
    "spider": ["spider"],
    "crab": ["crab"],
    "lobster": ["lobster"],
    "worm": ["worm"],
    "coral": ["coral"],
    "apple": ["apple"],
    "squash": ["squash"],
    "cabbage": ["cabbage"],
    "sandwich": ["sandwich"],
    "soup": ["soup"],
    "wine": ["wine"],
    "coffee": ["coffee"],
    "ice cream": ["frozen dessert"],
    "car": ["n02958343"],
    "truck": ["truck"],
    "van": ["van"],
    "bus": ["bus"],
    "bicycle": ["bicycle"],
    "motorcycle": ["minibike"],
    "cart": ["cart"],
    "handcart": ["handcart"],
    "sled": ["sled"],
    "locomotive": ["locomotive"],
    "railway car": ["n02959942"],
    "ship": ["ship"],
    "boat": ["boat"],
    "sailing boat": ["sailing vessel"],
    "airplane": ["heavier-than-air craft"],
    "hat": ["hat", "n02954340"],
    "helmet": ["n03513137", "n03513376"],
    "coat": ["coat"],
    "robe or gown": ["robe", "n03450230", "n03450516"],
    "skirt": ["skirt"],
    "swimsuit": ["swimsuit"],
    "shoe": ["n03380867"],
    "sock or stocking": ["hosiery"],
    "tie": ["necktie"],
    "scarf": ["scarf"],
    "sweater": ["sweater"],
    "armor": ["body armor"],
    "gun": ["gun"],
    "guitar": ["guitar"],
    "piano": ["piano"],
    "percussion instrument": ["percussion instrument"],
    "brass instrument": ["n02891788"],
    "woodwind": ["woodwind"],
    "chair": ["chair"],
    "bench": ["bench"],
    "table": ["n04379243", "n04379964"],
    "bed": ["bed", "baby bed"],
    "cabinet": ["cabinet", "chest of drawers"],
    "sofa": ["n03100346"],
    "curtain": ["curtain"],
    "rug or mat": ["rug", "mat"],
    "lamp": ["n03636248", "n03636649"],
    "bottle or jug": ["bottle"],
    "bag": ["bag"],
    "box": ["n02883344"],
    "basket": ["basket"],
    "pot or kettle": ["n03990474"],
    "pan": ["pan"],
    "telephone": ["telephone"],
    "computer": ["personal computer"],
    "camera": ["camera"],
    "pen": ["pen"],
    "clock": ["clock"],
    "watch": ["watch"],
    "ball": ["n02778669"],
    "weight": ["weight"],
    "gymnastic apparatus": ["gymnastic apparatus"],
    "fence": ["fence"],
    "roof": ["roof"],
    "shop": ["shop"],
    "place of worship": ["place of worship"],
    "mountain": ["mountain"],
    "shore": ["shore"],
    "lock": ["lock"],
}

# group: labels; goes before WordNet.
GROUP_OF = {
    "other plant": ["hay"],
    "flower": ["rapeseed"],
    "vegetable": ["corn", "ear"],
    "meal": ["mashed potato", "carbonara", "plate"],
    "bread": ["dough"],
    "fungus": ["mushroom"],
    "land vehicle": ["golfcart"],
    "train": ["bullet train", "streetcar"],
    "clothing": ["cloak", "mask", "gasmask", "ski mask", "pickelhaube"],
    "accessory": [
        *("sunglasses", "sunglass", "necklace", "wig", "hair slide", "umbrella", "wallet", "buckle"),
    ],
    "weapon or armor": ["holster", "scabbard", "breastplate", "guillotine"],
    "musical instrument": ["drumstick"],
    "furnishing": [
        *(
            "bathtub",
            "tub",
            "washbasin",
            "toilet seat",
            "lampshade",
            "quilt",
            "pillow",
            "window shade",
            "window screen",
        ),
        *(
            "fire screen",
            "mosquito net",
            "shoji",
            "doormat",
            "sleeping bag",
            "radiator",
            "prayer rug",
            "theater curtain",
        ),
    ],
    "kitchenware": [
        *("cup", "coffee mug", "beer glass", "goblet", "mixing bowl", "soup bowl", "pitcher", "measuring cup", "ladle"),
        *("wooden spoon", "saltshaker", "cocktail shaker", "mortar", "tray", "strainer", "can opener", "corkscrew"),
        *("cleaver", "plate rack", "Dutch oven", "Crock Pot"),
    ],
    "appliance": ["electric fan", "hand blower", "space heater", "stove"],
    "electronics": [
        *("Polaroid camera", "reflex camera", "radio", "photocopier", "loudspeaker", "microphone", "mouse", "joystick"),
        *("remote control", "screen", "computer keyboard", "typewriter keyboard", "space bar", "hard disc", "cassette"),
        *("projector", "web site"),
    ],
    "tool": ["carpenter's kit", "power drill", "chain saw", "paintbrush", "potter's wheel", "thimble"],
    "measuring instrument": ["abacus", "slide rule"],
    "sports equipment": ["ski", "snorkel", "puck", "racket", "paddle", "parachute"],
    "toy or amusement": [
        *("jigsaw puzzle", "crossword puzzle", "pinwheel", "carousel", "maypole", "maze", "piggy bank", "balloon"),
    ],
    "machine or machine part": [
        *("crane (machine)", "car wheel", "car mirror", "disk brake", "seat belt", "oil filter", "grille", "gas pump"),
        *("paddlewheel", "wing", "drilling platform", "reel"),
    ],
    "furniture": ["pool table"],
    "medical or laboratory item": [
        *("Band Aid", "neck brace", "oxygen mask", "crutch", "stretcher", "stethoscope", "syringe", "nipple"),
        *("Petri dish", "beaker"),
    ],
    "paper or stationery": [
        *("ballpoint", "fountain pen", "quill", "rubber eraser", "pencil sharpener", "binder", "envelope"),
        *("letter opener", "rule", "comic book", "book jacket", "menu", "packet", "toilet tissue"),
    ],
    "sign": ["street sign", "traffic light", "scoreboard"],
    "light": [
        *("candle", "torch", "spotlight", "table lamp", "matchstick", "lighter", "jack-o'-lantern"),
    ],
    "hardware": [
        *("screw", "nail", "hook", "knot", "padlock", "combination lock", "chain", "safety pin", "switch", "coil"),
    ],
    "other object": ["bubble", "flagpole", "pole", "spider web", "honeycomb", "stage", "birdhouse"],
    "other structure": ["water tower", "bell cote", "pier", "mobile home", "mountain tent", "yurt", "radio telescope"],
    "building": ["prison", "lumbermill", "home theater"],
    "part of a building": ["sliding door", "bannister", "patio"],
    "monument": ["obelisk", "totem pole", "pedestal", "altar", "fountain"],
}

# kind: labels; goes before WordNet.
KIND_OF = {
    "elephant": ["tusker"],
    "weasel": ["weasel", "mink", "polecat", "black-footed ferret"],
    "chicken": ["cock", "hen"],
    "peacock": ["peacock"],
    "crab": ["hermit crab"],
    "corn": ["corn", "ear"],
    "mushroom": ["mushroom", "agaric", "bolete"],
    "motorcycle": ["motor scooter"],
    "swimsuit": ["maillot"],
    "cup": ["cup", "coffee mug"],
    "glass": ["beer glass", "goblet"],
    "bowl": ["mixing bowl", "soup bowl"],
    "pot or kettle": ["Dutch oven", "Crock Pot"],
    "spoon": ["wooden spoon", "ladle"],
    "sunglasses": ["sunglasses", "sunglass"],
    "mask": ["mask", "gasmask", "ski mask"],
    "oxygen mask": ["oxygen mask"],
    "armor": ["breastplate", "bulletproof vest"],
    "violin or cello": ["violin", "cello"],
    "rug or mat": ["prayer rug", "doormat"],
    "screen or shade": ["window shade", "window screen", "fire screen", "shoji"],
    "keyboard": ["computer keyboard", "typewriter keyboard", "space bar"],
    "monitor": ["monitor", "screen"],
    "music player": ["cassette player", "CD player", "tape player", "iPod"],
    "puzzle": ["jigsaw puzzle", "crossword puzzle"],
    "drum": ["drum", "steel drum"],
    "drumstick": ["drumstick"],
    "towel": ["bath towel", "paper towel"],
    "sleeping bag": ["sleeping bag"],
    "punching bag": ["punching bag"],
    "safe": ["safe"],
    "mailbox": ["mailbox"],
    "candle": ["candle"],
    "jack-o'-lantern": ["jack-o'-lantern"],
    "flowerpot": ["pot"],
    "trousers": ["jean"],
    "shirt": ["jersey"],
    "glove": ["mitten"],
    "swan": ["black swan"],
    "shop": ["grocery store"],
    "barrel": ["barrel", "rain barrel"],
    "tent": ["mountain tent", "yurt"],
    "parachute": ["parachute"],
}


def wordnet(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Return the words and the nodes right above of each noun synset; the format is that of wndb(5WN)."""
    found = {}
    for line in (folder / "data.noun").read_text().splitlines():
        if not line.startswith("  "):  # the licence
            fields = line.partition("|")[0].split()
            words = int(fields[3], 16)
            pointers = fields[5 + 2 * words :]
            above = [f"n{pointers[i + 1]}" for i in range(0, len(pointers), 4) if pointers[i] in ("@", "@i")]
            found[f"n{fields[0]}"] = ([word.replace("_", " ") for word in fields[4 : 4 + 2 * words : 2]], above)
    return found


class Tree:
    """WordNet above the classes of ImageNet."""

    def __init__(self, folder: Path) -> None:
        self.nodes = wordnet(folder)
        self.above = {synset: list(self._climb(synset)) for synset in imagenet_synsets()}
        self._named = defaultdict(set)
        for node in {node for chain in self.above.values() for node in chain}:
            self._named[self.nodes[node][0][0]].add(node)

    def _climb(self, node: str) -> Iterator[str]:
        """Yield the node and what lies above it, the nearest first."""
        seen: dict[str, None] = {}
        level = [node]
        while level:
            seen |= dict.fromkeys(level)
            level = [above for each in level for above in self.nodes[each][1] if above not in seen]
        yield from seen

    def nearest(self, node: str, chosen: dict[str, str]) -> str | None:
        """Return what the nearest chosen node is called, None if none lies above."""
        return next((chosen[above] for above in self._climb(node) if above in chosen), None)

    def anchors(self, named: dict[str, list[str]]) -> dict[str, str]:
        """Return the name that each chosen node gets."""
        return {self.find(word): name for name, words in named.items() for word in words}

    def find(self, word: str) -> str:
        """Return the one node above the classes that is called so, or has this number."""
        found = {word} if word in self.nodes else self._named[word]
        assert len(found) == 1, f"{word!r} names {sorted(found)}"
        return next(iter(found))


def paths(tree: Tree) -> list[tuple[str, str, str, str]]:
    """Return label, kind, group and domain of each class, in the order of the logits."""
    domain_of = {group: domain for domain, groups in GROUPS.items() for group in groups}
    groups = tree.anchors({group: words for each in GROUPS.values() for group, words in each.items()})
    kinds = tree.anchors(KINDS)
    group_of = {label: group for group, labels in GROUP_OF.items() for label in labels}
    kind_of = {label: kind for kind, labels in KIND_OF.items() for label in labels}
    assert group_of.keys() | kind_of.keys() <= set(imagenet_labels())
    found = []
    for synset, label in zip(imagenet_synsets(), imagenet_labels(), strict=True):
        kind = kind_of.get(label) or tree.nearest(synset, kinds) or label
        group = group_of.get(label) or tree.nearest(synset, groups)
        assert group is not None, f"{label} is in no group"
        found.append((label, kind, group, domain_of[group]))
    return found


def main(folder: str) -> None:
    """Print the table."""
    rows = paths(Tree(Path(folder)))
    groups = defaultdict(set)
    for _, kind, group, _ in rows:
        groups[kind].add(group)
    for kind, several in groups.items():
        assert len(several) == 1, f"{kind}: {sorted(several)}"
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerows([LEVELS, *rows])


if __name__ == "__main__":
    main(*sys.argv[1:])
