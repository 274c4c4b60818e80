"""Command lines and answers of Google Cloud that the tests of launchers share."""

AT = "--name cocoa --project p --zone z"
REQUEST = f"{AT} --accelerator v5litepod-16 --runtime v2-alpha-tpuv5-lite --image r/p/i:1"
GKE = "--name cocoa --type v5e --topology 4x4 --image r/p/i:1"
XPK = f"{AT} --cluster k --tpu-type v5litepod-16 --image r/p/i:1"
COMMAND = "-- cocoa-stages --base /data/m --run gs://b/r"
STAGES = "--base /data/m --run gs://b/r --configs c"
FREE = {"taken": [[1, "NOT_FOUND"]]}
ACTIVE = {"describe": [[0, "ACTIVE"]]}
