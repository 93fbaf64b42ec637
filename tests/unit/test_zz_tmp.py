import obstore, uuid, threading
from concurrent.futures import ThreadPoolExecutor
def test_a(s3):
    for size in (3000, 10_000, 200_000):
        bad=0
        cl=[s3.bucket("out") for _ in range(6)]
        for rnd in range(100):
            key=f"q/{uuid.uuid4().hex}/p"
            bar=threading.Barrier(6)
            def c(i):
                bar.wait()
                try: obstore.put(cl[i],key,bytes([i])*size,mode="create",use_multipart=False); return i
                except obstore.exceptions.AlreadyExistsError: return None
            with ThreadPoolExecutor(6) as p: r=[x for x in p.map(c,range(6)) if x is not None]
            if len(r)!=1: bad+=1
        print("BAD",size,bad)
