//! How do requests and answers of OpenAI's API look? Only what a simulated model needs; other fields are let be.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;
use serde_json::{Value, json};

/// What `POST /v1/chat/completions` is sent.
///
/// What it shares with [`TextRequest`] is spelt out in both: serde loses the names of fields it flattens, and an error
/// has to say which is wrong.
#[derive(Debug, Deserialize)]
pub(super) struct ChatRequest {
    model: String,
    messages: Vec<Message>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<i64>,
}

/// What `POST /v1/completions` is sent.
#[derive(Debug, Deserialize)]
pub(super) struct TextRequest {
    model: String,
    prompt: Texts,
    max_tokens: Option<i64>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<i64>,
}

/// What both ask for, however they spell the rest.
#[derive(Debug)]
struct Common {
    model: String,
    tokens: Option<i64>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<i64>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Message {
    role: String,
    content: Option<Content>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "content is a string, or a list of parts with a type")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    /// Pictures and sounds have none, and count for nothing here.
    text: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "prompt is a string, or a list of one string")]
enum Texts {
    One(String),
    Many(Vec<String>),
}

/// What either request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) model: String,
    pub(super) prompt: String,
    pub(super) tokens: Option<i128>,
    pub(super) is_stream: bool,
    pub(super) include_usage: bool,
    is_chat: bool,
}

impl ChatRequest {
    /// The order; else what is wrong.
    pub(super) fn order(self) -> Result<Order, &'static str> {
        if self.messages.is_empty() {
            return Err("messages holds at least one message");
        }
        let prompt: String = self.messages.iter().map(Message::text).collect();
        let common = Common {
            model: self.model,
            tokens: self.max_completion_tokens.or(self.max_tokens),
            stream: self.stream,
            stream_options: self.stream_options,
            n: self.n,
        };
        common.order(prompt, true)
    }
}

impl TextRequest {
    /// The order; else what is wrong.
    pub(super) fn order(self) -> Result<Order, &'static str> {
        let prompt = match self.prompt {
            Texts::One(text) => text,
            Texts::Many(texts) => {
                let [text] = <[String; 1]>::try_from(texts)
                    .map_err(|_| "prompt is a string, or a list of one string")?;
                text
            }
        };
        let common = Common {
            model: self.model,
            tokens: self.max_tokens,
            stream: self.stream,
            stream_options: self.stream_options,
            n: self.n,
        };
        common.order(prompt, false)
    }
}

impl Common {
    fn order(self, prompt: String, is_chat: bool) -> Result<Order, &'static str> {
        if self.n.is_some_and(|n| n != 1) {
            return Err("n is 1: there is one choice");
        }
        Ok(Order {
            model: self.model,
            prompt,
            tokens: self.tokens.map(Into::into),
            is_stream: self.stream.unwrap_or(false),
            include_usage: self.stream_options.and_then(|o| o.include_usage).unwrap_or(false),
            is_chat,
        })
    }
}

impl Message {
    /// The message as a chat template writes it: turns of one conversation share their beginning.
    fn text(&self) -> String {
        let content = match &self.content {
            None => String::new(),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => {
                parts.iter().filter_map(|part| part.text.as_deref()).collect::<Vec<_>>().join(" ")
            }
        };
        format!("<|{}|> {content} <|end|>\n", self.role)
    }
}

/// What every answer to one request has in common.
#[derive(Debug)]
pub(super) struct Shape {
    id: String,
    created: u64,
    model: String,
    is_chat: bool,
}

impl Shape {
    pub(super) fn new(order: &Order, now: SystemTime) -> Self {
        static ANSWERS: AtomicU64 = AtomicU64::new(0);
        let kind = if order.is_chat { "chatcmpl" } else { "cmpl" };
        Self {
            id: format!("{kind}-{}", ANSWERS.fetch_add(1, Ordering::Relaxed)),
            created: now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            model: order.model.clone(),
            is_chat: order.is_chat,
        }
    }

    /// An answer that is not streamed.
    pub(super) fn whole(&self, text: &str, prompt_tokens: u32, tokens: u32) -> Value {
        let choice = if self.is_chat {
            json!({ "message": { "role": "assistant", "content": text } })
        } else {
            json!({ "text": text })
        };
        let object = if self.is_chat { "chat.completion" } else { "text_completion" };
        let mut whole = self.envelope(object, vec![closed(choice, true)]);
        whole["usage"] = usage(prompt_tokens, tokens);
        whole
    }

    /// The chunk before the first token, which says who speaks: only chats have one.
    pub(super) fn opening(&self) -> Option<Value> {
        let delta = json!({ "delta": { "role": "assistant", "content": "" } });
        self.is_chat.then(|| self.envelope(self.chunk_object(), vec![closed(delta, false)]))
    }

    /// The chunk of one token.
    pub(super) fn chunk(&self, token: &str, is_last: bool) -> Value {
        let choice = if self.is_chat {
            json!({ "delta": { "content": token } })
        } else {
            json!({ "text": token })
        };
        self.envelope(self.chunk_object(), vec![closed(choice, is_last)])
    }

    /// The chunk after the last token, for whoever asked for it.
    pub(super) fn usage_chunk(&self, prompt_tokens: u32, tokens: u32) -> Value {
        let mut chunk = self.envelope(self.chunk_object(), Vec::new());
        chunk["usage"] = usage(prompt_tokens, tokens);
        chunk
    }

    fn chunk_object(&self) -> &'static str {
        if self.is_chat { "chat.completion.chunk" } else { "text_completion" }
    }

    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": choices,
        })
    }
}

/// What every choice has beside its text.
fn closed(mut choice: Value, is_last: bool) -> Value {
    choice["index"] = 0.into();
    choice["logprobs"] = Value::Null;
    // A simulated model always writes as much as it may.
    choice["finish_reason"] = if is_last { "length".into() } else { Value::Null };
    choice
}

fn usage(prompt_tokens: u32, tokens: u32) -> Value {
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": u64::from(prompt_tokens) + u64::from(tokens),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(json: &str) -> ChatRequest {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn the_messages_of_a_chat_are_one_prompt() {
        let order = chat(
            r#"{"model": "m", "temperature": 0.5, "max_tokens": 3, "messages": [
                {"role": "system", "content": "be kind"}, {"role": "assistant", "content": null},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}"#,
        )
        .order()
        .unwrap();
        let prompt = "<|system|> be kind <|end|>\n<|assistant|>  <|end|>\n<|user|> a <|end|>\n";
        assert_eq!((order.prompt.as_str(), order.tokens), (prompt, Some(3)));
        assert!(!order.is_stream && !order.include_usage);
    }

    #[test]
    fn the_newer_name_of_the_limit_goes_before_the_older() {
        let order = chat(
            r#"{"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3,
                "max_completion_tokens": 4, "stream": true, "stream_options": {"include_usage": true}}"#,
        );
        let order = order.order().unwrap();
        assert_eq!((order.tokens, order.is_stream, order.include_usage), (Some(4), true, true));
    }

    #[test]
    fn what_a_simulated_model_cannot_do_is_refused() {
        let error = |json: &str| serde_json::from_str::<TextRequest>(json).unwrap().order();
        assert!(error(r#"{"model": "m", "prompt": ["a"]}"#).is_ok());
        for (json, says) in [
            (r#"{"model": "m", "prompt": ["a", "b"]}"#, "a list of one string"),
            (r#"{"model": "m", "prompt": "a", "n": 2}"#, "n is 1"),
        ] {
            assert!(error(json).unwrap_err().contains(says));
        }
        let tokens = serde_json::from_str::<TextRequest>(r#"{"model": "m", "prompt": [1, 2]}"#);
        assert!(tokens.unwrap_err().to_string().contains("prompt is a string"));
    }
}
