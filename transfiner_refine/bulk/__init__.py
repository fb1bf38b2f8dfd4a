"""Refining more images than fit into memory: streamed, restartable, on one machine or on a Ray cluster.

A :class:`~transfiner_refine.bulk.source.Source` knows the images and their coarse masks;
:mod:`~transfiner_refine.bulk.work` refines them in a stream; :mod:`~transfiner_refine.bulk.parts` keeps what is
finished; :func:`~transfiner_refine.bulk.job.run` is all of it.
"""
