"""Objects and bytes: everything between a Python object and the frames that a link moves.

    serialise    objects <-> frames (pickle 5, buffers beside the stream), small values as a blob
    arrays       numpy arrays as buffers, whatever their layout
    arguments    a call's arguments, with futures found and values put in
    references   what a future is to a pickler
    functions    functions as blobs with an id; `fingerprint` tells when one has changed
    exceptions   errors that keep their type and bring their traceback
    diagnose     the path to what cannot be pickled
    sampler      whether compressing a frame pays
    compress     frames through blosc and back

Nothing is imported here: the broker never needs this room, and a client needs only parts.
"""
