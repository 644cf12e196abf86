"""A model small enough to read: it sums the rows of a matrix and gives the matrix back."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Summer(MLModel):
    async def load(self) -> bool:
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = NumpyCodec.decode_input(payload.inputs[0])
        return InferenceResponse(
            model_name=self.name,
            outputs=[
                NumpyCodec.encode_output("sum", x.sum(axis=1)),
                NumpyCodec.encode_output("echo", x),
            ],
        )
