"""Language models over bytes, side by side: equal parameters, the same bytes in the same order, one table at the end.

    from unify.bytes.corpus import Corpus
    from unify.bytes.run import Run, train
    record = train(Run("palimpsa_key"), Corpus.read(["texts/"]), device="cuda")

What is measured stands in `unify.bytes.measure`; `unify bytes` is the command, `unify.bytes.report` draws its file.
"""
