import time,sys
def f():
    t=time.time(); n=len(sys.modules)
    import tedfx.ops.moe
    a=time.time()-t
    import torch
    torch.ops.tedfx.dispatch(torch.ones(2,2,requires_grad=True),torch.zeros(2,1,dtype=torch.int64),2)[0].sum().backward()
    return a,time.time()-t, len(sys.modules)-n, 'torch._dynamo' in sys.modules
