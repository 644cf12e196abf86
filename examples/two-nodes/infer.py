"""Calls the model `summer` through node a, over gRPC with TLS. Needs: pip install 'tritonclient[grpc]'"""

import sys

import numpy as np
import tritonclient.grpc as triton

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8443"
ca = sys.argv[2] if len(sys.argv) > 2 else ".isobar/ca.pem"

client = triton.InferenceServerClient(address, ssl=True, root_certificates=ca)
x = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)
tensor = triton.InferInput("x", x.shape, "FP32")
tensor.set_data_from_numpy(x)
print("ready:", client.is_server_ready())
print("sum:  ", client.infer("summer", [tensor]).as_numpy("sum").ravel())
