"""Which part of a prompt's text each of its tokens stands for."""

from tokenizers import Encoding


def doubled_tokens(encoding: Encoding) -> int:
    """How many tokens at the start were added although the text itself begins with them."""
    mask = encoding.special_tokens_mask  # 1 for what was added, not for what the text has
    added = next((place for place, one in enumerate(mask) if not one), len(mask))
    again = slice(added, 2 * added)
    ids = encoding.ids
    same = ids[:added] == ids[again]
    return added if same and not any(mask[again]) else 0


def token_slices(text: str, encoding: Encoding) -> list[str]:
    """For each token its slice of `text`; joined they are all of it, if there is a token.

    The offsets of the tokens of one character are all that character, and what a normalizer drops
    is in no offset: a slice ends where its token ends, but before the next one begins.
    """
    ends = _ends(len(text), encoding)
    starts = [0, *ends][: len(ends)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


def _ends(text_chars: int, encoding: Encoding) -> list[int]:
    own = [not added for added in encoding.special_tokens_mask]
    offsets = encoding.offsets  # made anew each time it is asked for
    last = max((place for place, one in enumerate(own) if one), default=0)
    ends, next_start = [0] * len(own), text_chars
    for place in reversed(range(len(own))):
        start, end = offsets[place]
        if own[place]:
            ends[place] = min(end, next_start)
            next_start = min(start, next_start)
    so_far = 0
    for place in range(len(own)):
        so_far = text_chars if place >= last else max(so_far, ends[place])
        ends[place] = so_far
    return ends
