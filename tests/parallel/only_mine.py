import time
from tests.parallel.check_schedules import *
def timed(f):
    def g(rank, folder):
        t=time.time(); f(rank, folder)
        if rank==0: print(f.__name__, round(time.time()-t,2), flush=True)
    return g
CHECKS={f.__name__: timed(f) for f in (divided_step_by_step,a_missing_sync_is_named,wrong_on_one_rank,refused_before_anything_changes,tied_weights_stay_tied,scheduled_llama,stages_of_a_pipeline)}
