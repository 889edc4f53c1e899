"""What is so in the small world: tables of things, materials, animals, foods, jobs, causes, people and their days.

Every table maps a subject to one value for each property, so that no two facts contradict each other. How facts are
worded stands in `world_wordings` and `world_stories`.

Example:
    >>> THINGS["knife"], ANIMALS["owl"][0], KINDS["bird"][0]
    (('iron', 'kitchen', 'cut bread'), 'bird', 'feathers')
"""

from __future__ import annotations

THINGS: dict[str, tuple[str, str, str]] = {
    "spoon": ("wood", "kitchen", "stir soup"),
    "ladder": ("wood", "shed", "reach the roof"),
    "broom": ("wood", "hall", "sweep the floor"),
    "chair": ("wood", "dining room", "sit down"),
    "pencil": ("wood", "school", "draw pictures"),
    "knife": ("iron", "kitchen", "cut bread"),
    "hammer": ("iron", "workshop", "drive nails"),
    "key": ("iron", "hall", "open a lock"),
    "needle": ("iron", "bedroom", "mend clothes"),
    "saw": ("iron", "workshop", "cut planks"),
    "bottle": ("glass", "cellar", "keep juice"),
    "mirror": ("glass", "bathroom", "see your face"),
    "lens": ("glass", "school", "make small print big"),
    "jar": ("glass", "cellar", "store jam"),
    "cup": ("clay", "kitchen", "drink tea"),
    "vase": ("clay", "dining room", "hold flowers"),
    "brick": ("clay", "yard", "build walls"),
    "book": ("paper", "library", "read stories"),
    "map": ("paper", "office", "find the way"),
    "letter": ("paper", "office", "send news"),
    "kite": ("paper", "attic", "play with the wind"),
    "scarf": ("wool", "wardrobe", "warm the neck"),
    "blanket": ("wool", "bedroom", "cover a bed"),
    "carpet": ("wool", "dining room", "make a floor soft"),
    "candle": ("wax", "attic", "light a dark room"),
    "crayon": ("wax", "school", "colour drawings"),
    "grindstone": ("stone", "workshop", "sharpen blades"),
    "mortar": ("stone", "kitchen", "crush seeds"),
    "pillar": ("stone", "church", "hold up a roof"),
    "ball": ("rubber", "yard", "play catch"),
    "tyre": ("rubber", "garage", "make a car roll"),
    "eraser": ("rubber", "school", "remove wrong lines"),
    "hose": ("rubber", "garden", "water plants"),
    "belt": ("leather", "wardrobe", "hold up trousers"),
    "glove": ("leather", "shed", "protect your hands"),
    "saddle": ("leather", "barn", "ride a horse"),
    "purse": ("leather", "hall", "carry coins"),
}
"""Material, room where it is kept, and use of each thing."""

MATERIALS: dict[str, tuple[str, str, str, str]] = {
    "wood": ("float", "burn", "land with a bang", "trees"),
    "iron": ("sink", "glow", "land with a bang", "ore"),
    "glass": ("sink", "crack", "break", "sand"),
    "clay": ("sink", "glow", "break", "river mud"),
    "paper": ("soak up water", "burn", "land softly", "old rags"),
    "wool": ("soak up water", "burn", "land softly", "sheep"),
    "wax": ("float", "melt", "break", "bees"),
    "stone": ("sink", "crack", "land with a bang", "hills"),
    "rubber": ("float", "melt", "bounce", "white sap"),
    "leather": ("soak up water", "burn", "land softly", "cow skins"),
}
"""What each material does in water, in a fire and when it is dropped, and what it comes from."""

KINDS: dict[str, tuple[str, str, str, str]] = {
    "bird": ("feathers", "two legs", "fly", "hatch in a nest"),
    "fish": ("scales", "no legs", "swim", "hatch in water"),
    "insect": ("a stiff skin", "six legs", "crawl", "begin as a grub"),
    "mammal": ("fur", "four legs", "run", "drink milk"),
    "shellfish": ("a shell", "ten legs", "walk sideways", "drift in the sea"),
}
"""Cover, legs, way to move and life of the young of each kind of animal."""

ANIMALS: dict[str, tuple[str, str, str]] = {
    "owl": ("bird", "a hollow tree", "mice"),
    "duck": ("bird", "a pond", "weeds"),
    "hen": ("bird", "a coop", "corn"),
    "crow": ("bird", "a tall tree", "scraps"),
    "sparrow": ("bird", "a hedge", "seeds"),
    "eagle": ("bird", "a cliff", "rabbits"),
    "dog": ("mammal", "a kennel", "bones"),
    "cat": ("mammal", "a basket", "fish"),
    "horse": ("mammal", "a stable", "hay"),
    "cow": ("mammal", "a meadow", "grass"),
    "pig": ("mammal", "a sty", "turnips"),
    "mouse": ("mammal", "a hole", "cheese"),
    "bear": ("mammal", "a cave", "berries"),
    "wolf": ("mammal", "a forest", "deer"),
    "squirrel": ("mammal", "an old oak", "nuts"),
    "trout": ("fish", "a stream", "flies"),
    "pike": ("fish", "a lake", "frogs"),
    "shark": ("fish", "the open sea", "seals"),
    "carp": ("fish", "a pond", "worms"),
    "bee": ("insect", "a hive", "nectar"),
    "ant": ("insect", "a sand heap", "crumbs"),
    "cricket": ("insect", "a lawn", "leaves"),
    "beetle": ("insect", "a rotten log", "bark"),
    "moth": ("insect", "a wardrobe", "wool"),
    "crab": ("shellfish", "a beach", "snails"),
    "lobster": ("shellfish", "a reef", "mussels"),
    "shrimp": ("shellfish", "a tide pool", "sand worms"),
}
"""Kind, home and food of each animal."""

SOUNDS: dict[str, str] = {
    "owl": "hoot", "duck": "quack", "hen": "cluck", "crow": "caw", "sparrow": "chirp", "eagle": "scream",
    "dog": "bark", "cat": "purr", "horse": "neigh", "cow": "moo", "pig": "grunt", "mouse": "squeak", "bear": "growl",
    "wolf": "howl", "bee": "hum", "cricket": "sing",
}  # fmt: skip
"""The noise of each animal that makes one."""

SIZES = (
    "ant", "bee", "shrimp", "mouse", "sparrow", "squirrel", "duck", "cat", "dog", "wolf", "pig", "bear", "cow",
)  # fmt: skip
"""Animals from the smallest to the biggest."""

FOODS: dict[str, tuple[str, str, str]] = {
    "cherry": ("red", "sweet", "a tree"),
    "lemon": ("yellow", "sour", "a tree"),
    "olive": ("green", "bitter", "a tree"),
    "carrot": ("orange", "sweet", "the ground"),
    "onion": ("white", "hot", "the ground"),
    "beet": ("purple", "sweet", "the ground"),
    "milk": ("white", "mild", "a cow"),
    "butter": ("yellow", "mild", "a cow"),
    "honey": ("golden", "sweet", "a bee"),
    "salt": ("white", "salty", "the sea"),
    "seaweed": ("green", "salty", "the sea"),
    "pepper": ("black", "hot", "a vine"),
    "grape": ("purple", "sweet", "a vine"),
    "ham": ("pink", "salty", "a pig"),
    "coffee": ("brown", "bitter", "a bush"),
    "cranberry": ("red", "sour", "a bush"),
    "egg": ("brown", "mild", "a hen"),
    "bread": ("brown", "mild", "a field"),
    "mustard": ("yellow", "hot", "a field"),
}
"""Colour, taste and origin of each food."""

JOBS: dict[str, tuple[str, str, str]] = {
    "baker": ("bakery", "oven", "make bread"),
    "farmer": ("farm", "plough", "grow corn"),
    "doctor": ("hospital", "bandage", "heal the sick"),
    "teacher": ("school", "blackboard", "teach children"),
    "fisher": ("harbour", "net", "catch herring"),
    "tailor": ("tailor's shop", "needle", "sew coats"),
    "carpenter": ("workshop", "saw", "make tables"),
    "painter": ("studio", "brush", "paint portraits"),
    "gardener": ("park", "rake", "plant roses"),
    "postman": ("post office", "bag", "bring mail"),
    "librarian": ("library", "book", "lend novels"),
    "miner": ("mine", "pick", "dig for coal"),
    "smith": ("forge", "hammer", "shape horseshoes"),
    "pilot": ("airport", "plane", "fly travellers"),
    "mason": ("building site", "brick", "build houses"),
}
"""Place of work, tool and work of each job."""

OPPOSITES: dict[str, str] = {
    "hot": "cold", "wet": "dry", "full": "empty", "heavy": "light", "loud": "quiet", "fast": "slow", "old": "new",
    "early": "late", "rich": "poor", "strong": "weak", "dark": "bright", "clean": "dirty", "high": "low",
    "wide": "narrow", "hard": "soft", "sick": "healthy",
}  # fmt: skip
"""Words that mean the contrary of each other."""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SEASONS: dict[str, str] = {
    "winter": "snow covers the fields", "spring": "the first flowers open", "summer": "the sun is hottest",
    "autumn": "the leaves drop",
}  # fmt: skip
"""What happens in each part of the year."""

CAUSES: dict[str, tuple[str, str]] = {
    "ice": ("leave ice in the sun", "the ice turned to water"),
    "milk": ("leave milk in a warm place for days", "the milk went sour"),
    "oven": ("forget a cake in the oven", "the cake was black"),
    "frost": ("leave a bucket of water out in the frost", "the water was frozen"),
    "fire": ("pour water on a camp fire", "the fire went out"),
    "seed": ("put a seed in wet soil", "a small plant came up"),
    "rain": ("leave a bicycle in the rain", "the bicycle was rusty"),
    "balloon": ("press a pin into a balloon", "the balloon burst"),
    "sugar": ("stir sugar into a drink", "the drink was sweet"),
    "laundry": ("hang wet shirts in the wind", "the shirts were dry"),
    "lamp": ("turn off the only lamp at night", "the room was dark"),
    "bath": ("pull the plug of a bath", "the bath was empty"),
    "hands": ("rub cold fingers together", "the fingers were warm"),
    "magnet": ("hold a magnet over pins", "the pins hung on the magnet"),
    "snow": ("walk across fresh snow", "there were footprints"),
    "kettle": ("put a kettle on the stove", "steam came out"),
    "flowers": ("give roses no water", "the roses were brown"),
    "dough": ("put yeast into dough", "the dough was twice as big"),
}
"""What somebody does, and what has come of it a little later."""

NAMES = (
    "Tom", "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Ida", "Jack", "Kate", "Leo", "Mary",
    "Nick", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wanda", "Max", "Lucy",
)  # fmt: skip
"""People, of whom nothing is known but what a text says."""

DECIMALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
"""Numbers in words."""
