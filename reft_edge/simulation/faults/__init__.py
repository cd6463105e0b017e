"""Break a running federation at seeded moments, and see that it finishes by itself and loses nothing.

words       a fault, its moment, what became of a run: value objects
drawing     which faults a seed means
site        the federation that is broken: small, fixed profiles, so that its result is the same every time
cast        its processes: started, killed, stopped, continued, started again
ways        how each of them reaches the broker: a proxy, which can be cut; `lossy_way` is one that loses packets
disk        a spool's disk, which can be full
progress    where the federation is, read from what it writes to disk
injector    does a run's faults when their moments come
inspection  what must be true afterwards
play        one run
campaign    many runs, kept as they come, and their summary
"""
