//! What does a KServe v2 request ask for, and how is a text put into a response? Tensors as Triton spells them.
//!
//! One BYTES tensor in, `text_input`, one out, `text_output`, of one element each. Either as `contents.bytes_contents`
//! or raw: four bytes of length, little-endian, then the bytes; never both in one request. A response is raw when its
//! request was.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{BufMut as _, Bytes, BytesMut};
use proto::inference::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse,
    infer_parameter::ParameterChoice, model_infer_response::InferOutputTensor,
};

use crate::gpu::shown;

/// The tensor that holds the prompt.
pub(crate) const INPUT: &str = "text_input";
/// The tensor that holds what was generated.
pub(crate) const OUTPUT: &str = "text_output";
/// The type of both.
pub(crate) const BYTES: &str = "BYTES";
/// The only version of the model.
pub(crate) const VERSION: &str = "1";
/// How many tokens to generate: a parameter of the request.
const TOKENS: &str = "max_tokens";
/// Whether a response of a stream is the last of its request: Triton's name.
const FINAL: &str = "triton_final_response";

/// Why a request cannot be understood. The caller's fault; the same request fails again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("send the prompt in an input `{INPUT}` of datatype {BYTES}; there is none")]
    NoInput,
    #[error("input `{INPUT}` has datatype {BYTES}, not `{0}`")]
    Datatype(String),
    #[error("there are two inputs `{0}`")]
    Twice(String),
    #[error("input `{INPUT}` has shape [1] or [1, 1], for one text")]
    Shape,
    #[error("input `{INPUT}` holds one text, not {0}")]
    Elements(usize),
    #[error("raw_input_contents has one entry per input: {inputs} inputs, {raw} entries")]
    RawEntries { inputs: usize, raw: usize },
    #[error("contents go into raw_input_contents or into the inputs, not both")]
    RawAndTyped,
    #[error(
        "raw contents of `{INPUT}` are four bytes of length, little-endian, and that many bytes of text"
    )]
    Raw,
    #[error("`{INPUT}` is UTF-8, and this is not")]
    Text,
    #[error("parameter `{TOKENS}` is a whole number, as int64_param or in string_param")]
    Tokens,
    #[error("the only output is `{OUTPUT}`, not `{0}`")]
    Output(String),
}

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Asked<'a> {
    pub(crate) prompt: &'a str,
    pub(crate) tokens: Option<i128>,
}

/// Reads a request. Other inputs are let be: clients of Triton's LLM backends send a few.
pub(crate) fn read(request: &ModelInferRequest) -> Result<Asked<'_>, RequestError> {
    let other = request.outputs.iter().find(|output| output.name != OUTPUT);
    if let Some(other) = other {
        return Err(RequestError::Output(shown(&other.name)));
    }
    let prompt = std::str::from_utf8(prompt(request)?).map_err(|_| RequestError::Text)?;
    Ok(Asked { prompt, tokens: tokens(&request.parameters)? })
}

fn prompt(request: &ModelInferRequest) -> Result<&[u8], RequestError> {
    check_names(request)?;
    let found = request.inputs.iter().enumerate().find(|(_, input)| input.name == INPUT);
    let (index, input) = found.ok_or(RequestError::NoInput)?;
    if input.datatype != BYTES {
        return Err(RequestError::Datatype(shown(&input.datatype)));
    }
    if !matches!(input.shape[..], [1] | [1, 1]) {
        return Err(RequestError::Shape);
    }
    if is_raw(request) {
        return raw_prompt(request, index);
    }
    let elements = input.contents.as_ref().map_or(&[][..], |contents| &contents.bytes_contents);
    match elements {
        [text] => Ok(text),
        other => Err(RequestError::Elements(other.len())),
    }
}

/// Two inputs of one name: nobody can say which is meant.
fn check_names(request: &ModelInferRequest) -> Result<(), RequestError> {
    let mut names = BTreeSet::new();
    match request.inputs.iter().find(|input| !names.insert(input.name.as_str())) {
        Some(input) => Err(RequestError::Twice(shown(&input.name))),
        None => Ok(()),
    }
}

fn raw_prompt(request: &ModelInferRequest, index: usize) -> Result<&[u8], RequestError> {
    if request.inputs.iter().any(|input| input.contents.is_some()) {
        return Err(RequestError::RawAndTyped);
    }
    let (inputs, raw) = (request.inputs.len(), request.raw_input_contents.len());
    if inputs != raw {
        return Err(RequestError::RawEntries { inputs, raw });
    }
    let entry = request.raw_input_contents.get(index).ok_or(RequestError::Raw)?;
    element(entry).ok_or(RequestError::Raw)
}

/// The only element of a raw tensor.
fn element(raw: &[u8]) -> Option<&[u8]> {
    let (length, text) = raw.split_first_chunk()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    (text.len() == length).then_some(text)
}

fn tokens(parameters: &BTreeMap<String, InferParameter>) -> Result<Option<i128>, RequestError> {
    let Some(parameter) = parameters.get(TOKENS) else { return Ok(None) };
    match &parameter.parameter_choice {
        Some(ParameterChoice::Int64Param(tokens)) => Ok(Some((*tokens).into())),
        Some(ParameterChoice::Uint64Param(tokens)) => Ok(Some((*tokens).into())),
        Some(ParameterChoice::StringParam(text)) => {
            text.parse::<i64>().map(|tokens| Some(tokens.into())).map_err(|_| RequestError::Tokens)
        }
        Some(ParameterChoice::BoolParam(_) | ParameterChoice::DoubleParam(_)) | None => {
            Err(RequestError::Tokens)
        }
    }
}

/// Whether tensors come, and go back, in `raw_…_contents`.
fn is_raw(request: &ModelInferRequest) -> bool {
    !request.raw_input_contents.is_empty()
}

/// What a response repeats of its request.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    model: String,
    id: String,
    raw: bool,
}

impl Reply {
    pub(crate) fn to(request: &ModelInferRequest) -> Self {
        let (model, id) = (request.model_name.clone(), request.id.clone());
        Self { model, id, raw: is_raw(request) }
    }

    /// A response without a tensor.
    pub(crate) fn empty(&self) -> ModelInferResponse {
        ModelInferResponse {
            model_name: self.model.clone(),
            model_version: VERSION.to_owned(),
            id: self.id.clone(),
            ..ModelInferResponse::default()
        }
    }

    /// A response that holds `text`.
    pub(crate) fn text(&self, text: String) -> ModelInferResponse {
        let mut response = self.empty();
        let contents = if self.raw {
            response.raw_output_contents.push(raw(&text));
            None
        } else {
            let bytes_contents = vec![text.into_bytes()];
            Some(InferTensorContents { bytes_contents, ..InferTensorContents::default() })
        };
        response.outputs.push(InferOutputTensor {
            name: OUTPUT.to_owned(),
            datatype: BYTES.to_owned(),
            shape: vec![1],
            parameters: BTreeMap::new(),
            contents,
        });
        response
    }

    /// A response of a stream.
    pub(crate) fn token(&self, text: String, is_last: bool) -> ModelInferResponse {
        let choice = Some(ParameterChoice::BoolParam(is_last));
        let parameter = InferParameter { parameter_choice: choice };
        let mut response = self.text(text);
        response.parameters.insert(FINAL.to_owned(), parameter);
        response
    }
}

fn raw(text: &str) -> Bytes {
    let mut raw = BytesMut::with_capacity(4 + text.len());
    raw.put_u32_le(u32::try_from(text.len()).unwrap_or(u32::MAX));
    raw.put_slice(text.as_bytes());
    raw.freeze()
}

#[cfg(test)]
mod tests {
    use proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};

    use super::*;

    fn input(name: &str, texts: &[&[u8]]) -> InferInputTensor {
        let bytes_contents = texts.iter().map(|text| text.to_vec()).collect();
        InferInputTensor {
            name: name.to_owned(),
            datatype: BYTES.to_owned(),
            shape: vec![1],
            contents: Some(InferTensorContents { bytes_contents, ..Default::default() }),
            ..Default::default()
        }
    }

    fn request(texts: &[&[u8]]) -> ModelInferRequest {
        ModelInferRequest { inputs: vec![input(INPUT, texts)], ..Default::default() }
    }

    /// A request whose inputs have these names, with the contents of each apart.
    fn raw_request(names: &[&str], raw_input_contents: Vec<Bytes>) -> ModelInferRequest {
        let bare = |name: &&str| InferInputTensor { contents: None, ..input(name, &[]) };
        let inputs = names.iter().map(bare).collect();
        ModelInferRequest { inputs, raw_input_contents, ..Default::default() }
    }

    fn with_tokens(choice: ParameterChoice) -> ModelInferRequest {
        let parameter = InferParameter { parameter_choice: Some(choice) };
        let parameters = BTreeMap::from([(TOKENS.to_owned(), parameter)]);
        ModelInferRequest { parameters, ..request(&[b"hi"]) }
    }

    #[test]
    fn a_prompt_comes_in_contents_or_raw() {
        assert_eq!(read(&request(&[b"hi"])), Ok(Asked { prompt: "hi", tokens: None }));
        let contents = vec![Bytes::from_static(&[1]), raw("hi")];
        let mut two = raw_request(&["stream", INPUT], contents);
        assert_eq!(read(&two), Ok(Asked { prompt: "hi", tokens: None }));
        two.raw_input_contents.pop();
        assert_eq!(read(&two), Err(RequestError::RawEntries { inputs: 2, raw: 1 }));
    }

    #[test]
    fn tokens_come_as_a_number_or_in_a_string() {
        for (choice, want) in [
            (ParameterChoice::Int64Param(-7), Ok(Some(-7))),
            (ParameterChoice::Uint64Param(u64::MAX), Ok(Some(u64::MAX.into()))),
            (ParameterChoice::StringParam("12".to_owned()), Ok(Some(12))),
            (ParameterChoice::StringParam("many".to_owned()), Err(RequestError::Tokens)),
            (ParameterChoice::BoolParam(true), Err(RequestError::Tokens)),
            (ParameterChoice::DoubleParam(1.0), Err(RequestError::Tokens)),
        ] {
            let request = with_tokens(choice);
            assert_eq!(read(&request).map(|asked| asked.tokens), want);
        }
    }

    #[test]
    fn a_request_that_cannot_be_understood_says_what_is_expected() {
        let raw_entry = |entry: &[u8]| raw_request(&[INPUT], vec![Bytes::copy_from_slice(entry)]);
        let both = ModelInferRequest { raw_input_contents: vec![raw("a")], ..request(&[b"a"]) };
        let shaped = |shape: &[i64]| {
            let shape = shape.to_vec();
            let inputs = vec![InferInputTensor { shape, ..input(INPUT, &[b"a"]) }];
            ModelInferRequest { inputs, ..Default::default() }
        };
        assert!(read(&shaped(&[1, 1])).is_ok());
        let other_type = ModelInferRequest {
            inputs: vec![InferInputTensor { datatype: "FP32".to_owned(), ..input(INPUT, &[b""]) }],
            ..Default::default()
        };
        let name = "logits".to_owned();
        let other_output = ModelInferRequest {
            outputs: vec![InferRequestedOutputTensor { name, ..Default::default() }],
            ..request(&[b"hi"])
        };
        for (request, says) in [
            (ModelInferRequest::default(), "an input `text_input` of datatype BYTES"),
            (other_type, "datatype BYTES, not `FP32`"),
            (request(&[]), "holds one text, not 0"),
            (request(&[b"a", b"b"]), "holds one text, not 2"),
            (request(&[b"\xff"]), "is UTF-8"),
            (raw_entry(b"\x02\0\0"), "four bytes of length"),
            (raw_entry(b"\x02\0\0\0a"), "four bytes of length"),
            (raw_entry(b"\xff\xff\xff\xffa"), "four bytes of length"),
            (both, "not both"),
            (raw_request(&[INPUT, INPUT], vec![raw("a"), raw("a")]), "two inputs `text_input`"),
            (shaped(&[]), "shape [1] or [1, 1]"),
            (shaped(&[2]), "shape [1] or [1, 1]"),
            (shaped(&[1, 2]), "shape [1] or [1, 1]"),
            (shaped(&[-1]), "shape [1] or [1, 1]"),
            (other_output, "the only output is `text_output`, not `logits`"),
        ] {
            let error = read(&request).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn a_response_is_raw_when_its_request_was() {
        let plain = Reply::to(&request(&[b"hi"])).text("yo".to_owned());
        assert_eq!(plain.outputs[0].contents.as_ref().unwrap().bytes_contents, [b"yo"]);
        assert!(plain.raw_output_contents.is_empty());
        let request =
            ModelInferRequest { id: "7".to_owned(), ..raw_request(&[INPUT], vec![raw("hi")]) };
        let response = Reply::to(&request).token("yo".to_owned(), true);
        assert_eq!(response.raw_output_contents, [&b"\x02\0\0\0yo"[..]]);
        assert_eq!((response.outputs[0].contents.as_ref(), response.id.as_str()), (None, "7"));
        let last = &response.parameters[FINAL].parameter_choice;
        assert_eq!(*last, Some(ParameterChoice::BoolParam(true)));
    }
}
