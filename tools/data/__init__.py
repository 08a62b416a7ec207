"""From a local copy of a public set to problem rows: one module a step, in the order of ``prepare.prepare``.

sources (read), adapters (what a set's columns mean), filters, overlap, solved (what is left out), manifest (what was
done, beside the output).
"""
