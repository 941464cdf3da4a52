"""What ends the tour early."""


class TourError(Exception):
    """The tour cannot go on; the text is one sentence for the user."""
