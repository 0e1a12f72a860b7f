"""A segmenter of your own: so many lines to a segment (docs/factories.md).

data: {segmenter: "own_segmenter:make", segmenter_settings: {lines: 2}}
"""


def make(lines=2):
    """Called once, with data.segmenter_settings."""

    def cut(text):
        """Pieces that join to the text, none of them empty."""
        whole = text.splitlines(keepends=True)
        return ["".join(whole[start : start + lines]) for start in range(0, len(whole), lines)]

    return cut
