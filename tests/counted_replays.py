"""Which calls were replayed."""

from foveal.kernels.record import Record


def replays(patch=setattr) -> list[Record]:
    """A list that fills with the records that run, of those that are made from now on; `patch` sets attributes."""
    runs, init = [], Record.__init__

    def counted(self, *arguments):
        init(self, *arguments)
        run = self.run
        self.run = lambda tensors: runs.append(self) or run(tensors)

    patch(Record, "__init__", counted)
    return runs
