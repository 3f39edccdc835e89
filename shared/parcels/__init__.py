"""What parcels are made of: kinds of numbers, streams of bytes, methods. Imports numpy and pcodec, which take long:
``shared/parcel.py``, which is for everybody, imports it when a parcel is encoded or decoded."""
