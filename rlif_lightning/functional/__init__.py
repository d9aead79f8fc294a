"""The mathematics of RLIF as plain functions of tensors.

This room imports torch and the standard library only, so that every formula can be read, tested and reused without a
trainer, a model library or a configuration. In the order of a training step: :mod:`seeds`, :mod:`token_stats` and
:mod:`chunked`, :mod:`aggregation`, :mod:`advantages`, :mod:`similarity` and :mod:`entropy`, :mod:`surrogates`,
:mod:`loss_records` and :mod:`losses`, :mod:`fused_loss`, :mod:`cast_linear`.

Reductions run in fp32 at least; float64 stays float64. Letters in shapes are those of :mod:`rlif_lightning`.
"""
