"""Stands in front of boto3 for the processes that tests start.

It is here for the S3 server of the tests; a deployment has none. Where it is installed, securesystemslib imports it
(for keys in AWS's KMS, which nobody here has), and each of some hundred processes would start a tenth later.
"""

raise ImportError("no part of nearshard uses boto3")
