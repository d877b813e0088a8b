"""The ends of what makes sense for the numbers of a spec. Standard library only.

Nothing published comes near them; what lies beyond is a slip of the pen, and could stop whatever counts
with it.
"""

from cim_core.rules import Rules

MOST_STEPS = 10**12  # of a training, and images; at a thousand a second they take 30 years
LEAST_EPOCHS, MOST_EPOCHS = 1e-9, 10**6
MOST_PIXELS, MOST_CHANNELS, MOST_BLOCKS, MOST_HEADS = 8192, 16_384, 256, 1024
MOST_IMAGES_A_STEP = 2**20
MOST_CODES = 2**20  # of a tokenizer
MOST_WEIGHT = 10**6  # of a loss, and of whatever else is a factor
MOST_RATE = 100
TEMPERATURES = (1e-3, 1e3)  # of a softmax
LARGEST_SEED = 2**63 - 1
MOST_LOADERS = 256
# Of timm's arguments these say how large a network gets, so that one beyond these ends is never built.
MOST_OPTION = 10**6
MOST_OF_OPTION = {"depth": MOST_BLOCKS, "embed_dim": MOST_CHANNELS, "num_heads": MOST_HEADS}


def check_length(rules: Rules) -> None:
    """Judge the three keys of a length; that just one is given is another rule."""
    rules.within(1, MOST_STEPS, "steps", "images")
    rules.within(LEAST_EPOCHS, MOST_EPOCHS, "epochs")


def check_blocks(rules: Rules) -> None:
    """Judge the sizes of a plain ViT."""
    rules.within(1, MOST_BLOCKS, "depth")
    rules.within(1, MOST_CHANNELS, "width")
    rules.within(1, MOST_HEADS, "heads")


def option_rule(name: str, value: float | str) -> str:
    """The rule that an argument for timm breaks; empty for none."""
    if isinstance(value, str):
        # YAML takes a bare inf or 1e400 for text, and timm would count with it.
        return "must be a number without quotes, or a text that is none" if _is_number(value) else ""
    low, high = (1, MOST_OF_OPTION[name]) if name in MOST_OF_OPTION else (-MOST_OPTION, MOST_OPTION)
    return "" if low <= value <= high else f"must lie between {low} and {high}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
