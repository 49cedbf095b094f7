"""The one error class of the library: three facts in one sentence."""


class UnifyError(ValueError):
    """What was given, which leg of the triple or which axis it fails, and what would have worked.

    given: what the caller passed, in the caller's own words.
    fails: the leg, argument or axis at fault, and why.
    works: what to pass instead.
    """

    def __init__(self, given: str, fails: str, works: str):
        self.given, self.fails, self.works = given, fails, works
        super().__init__(f"{given}: {fails}; {works}")
