"""Federated updates: what sites send of their training. Pure.

``segments``, ``codecs`` and ``document`` import numpy only when a codec is made, so that who only reads names and
headers does not wait for it; the codecs themselves, and ``feedback``, import it at once.
"""
