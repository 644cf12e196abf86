//! Which model does a gRPC body ask for? Read from its first message while the body is relayed.
//!
//! The framing is gRPC over HTTP/2, "Length-Prefixed-Message": a flag byte (1: compressed), four bytes of length, the
//! message. Later messages of a stream are not read: all of a call goes where its first message belongs.

use base::{ModelName, NameError};

use crate::{fields::Fields, inflate::Inflate};

/// Flag byte and length.
const PREFIX_BYTES: usize = 5;

/// Reads the model's name from the first message of a body, in pieces as they come.
///
/// Push every piece until [`Progress`] is something other than [`Progress::NeedMore`]; the pieces stay the caller's to
/// keep and relay. The reader holds the name, and for compressed messages a window of 32 KiB, however long the message.
///
/// The first non-empty occurrence of the field counts. Protobuf lets a later one override it, but no encoder writes a
/// field twice, and waiting for the end would mean holding every tensor back.
#[derive(Debug)]
pub struct ModelReader {
    encoding: Encoding,
    limit: usize,
    fields: Fields,
    part: Part,
    progress: Progress,
}

/// What is known of the model so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The name has not come yet.
    NeedMore,
    /// The body asks for this model.
    Found(ModelName),
    /// The first message ended, or the body did before it, without naming a model.
    Absent,
    /// The name cannot be read; more bytes will not change that.
    Unreadable(ReadError),
}

/// Why a model's name cannot be read. The caller of the RPC is at fault, nothing was forwarded, and the same request
/// will fail again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The body does not begin with a gRPC message.
    #[error("a gRPC message begins with a flag of 0 or 1, not {flag}")]
    Flag {
        /// What stands in its place.
        flag: u8,
    },
    /// The message is compressed in a way the headers do not say, or that nodes do not read.
    #[error("the message is compressed, but grpc-encoding is neither gzip nor deflate")]
    Encoding,
    /// The compressed stream is broken.
    #[error("the message does not decompress by its grpc-encoding")]
    Compressed,
    /// The message is not protobuf, or names the model in another type than string.
    #[error("the message is not a valid request of its method")]
    Malformed,
    /// The message ends inside a field, or the body inside the message.
    #[error("the message is cut short")]
    Truncated,
    /// The name did not come within the bytes a node is ready to hold back.
    #[error("no model name in the first {limit} bytes of the message: put it before the tensors")]
    TooFar {
        /// How many those are.
        limit: usize,
    },
    /// The name is far longer than any model's.
    #[error("a model name of {bytes} bytes is too long")]
    NameLength {
        /// Its length.
        bytes: usize,
    },
    /// The name is not text.
    #[error("the model name is not UTF-8")]
    NameText,
    /// The name is text, but not a model's.
    #[error(transparent)]
    Name(#[from] NameError),
}

/// How a body's compressed messages are compressed, as `grpc-encoding` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Not at all.
    Identity,
    /// RFC 1952.
    Gzip,
    /// RFC 1950, zlib.
    Deflate,
    /// Something nodes do not read. Messages may still come uncompressed.
    Other,
}

impl Encoding {
    /// The encoding a `grpc-encoding` header names; none means identity.
    #[must_use]
    pub fn from_header(value: Option<&[u8]>) -> Self {
        match value {
            None | Some(b"identity") => Self::Identity,
            Some(b"gzip") => Self::Gzip,
            Some(b"deflate") => Self::Deflate,
            Some(_) => Self::Other,
        }
    }
}

/// Where in the body the next byte lies.
#[derive(Debug)]
enum Part {
    Prefix { bytes: [u8; PREFIX_BYTES], have: usize },
    Message { left: usize, inflate: Option<Box<Inflate>> },
}

impl ModelReader {
    /// A reader for the string field numbered `field`, of a body whose headers say `encoding`.
    ///
    /// `limit` bounds the bytes of the message that are looked at, compressed and decompressed each; what lies beyond
    /// makes the name unreadable. A field that is too long to skip within it is refused as soon as its length is known.
    #[must_use]
    pub fn new(field: u32, encoding: Encoding, limit: usize) -> Self {
        Self {
            encoding,
            limit,
            fields: Fields::new(field, limit),
            part: Part::Prefix { bytes: [0; PREFIX_BYTES], have: 0 },
            progress: Progress::NeedMore,
        }
    }

    /// Looks at the next bytes of the body. Once the answer is known, further bytes are ignored.
    pub fn push(&mut self, data: &[u8]) -> &Progress {
        if self.progress == Progress::NeedMore {
            self.progress = self.look(data).unwrap_or_else(Progress::Unreadable);
        }
        &self.progress
    }

    /// The body has ended.
    pub fn end(&mut self) -> &Progress {
        if self.progress == Progress::NeedMore {
            self.progress = match self.part {
                Part::Prefix { have: 0, .. } => Progress::Absent,
                _ => Progress::Unreadable(ReadError::Truncated),
            };
        }
        &self.progress
    }

    /// What is known so far.
    #[must_use]
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// What is known in the end, by value.
    #[must_use]
    pub fn into_progress(self) -> Progress {
        self.progress
    }

    fn look(&mut self, data: &[u8]) -> Result<Progress, ReadError> {
        let data = self.prefix(data)?;
        let Part::Message { left, inflate } = &mut self.part else {
            return Ok(Progress::NeedMore);
        };
        let data = &data[..data.len().min(*left)];
        *left -= data.len();
        let found = match inflate {
            Some(inflate) => inflate.push(data, &mut self.fields)?,
            None => self.fields.push(data)?,
        };
        if let Some(name) = found {
            return Ok(Progress::Found(name));
        }
        if *left > 0 {
            return Ok(Progress::NeedMore);
        }
        match inflate {
            Some(inflate) => inflate.end(&self.fields)?,
            None => self.fields.end()?,
        }
        Ok(Progress::Absent)
    }

    /// Takes what `data` holds of the prefix and returns the rest.
    fn prefix<'a>(&mut self, data: &'a [u8]) -> Result<&'a [u8], ReadError> {
        let Part::Prefix { bytes, have } = &mut self.part else {
            return Ok(data);
        };
        let (prefix, rest) = data.split_at(data.len().min(PREFIX_BYTES - *have));
        bytes[*have..*have + prefix.len()].copy_from_slice(prefix);
        *have += prefix.len();
        if *have == PREFIX_BYTES {
            let [flag, length @ ..] = *bytes;
            self.part = Part::Message {
                left: u32::from_be_bytes(length) as usize,
                inflate: self.decompressor(flag)?.map(Box::new),
            };
        }
        Ok(rest)
    }

    fn decompressor(&self, flag: u8) -> Result<Option<Inflate>, ReadError> {
        match (flag, self.encoding) {
            (0, _) => Ok(None),
            (1, Encoding::Gzip) => Ok(Some(Inflate::gzip(self.limit))),
            (1, Encoding::Deflate) => Ok(Some(Inflate::zlib(self.limit))),
            (1, Encoding::Identity | Encoding::Other) => Err(ReadError::Encoding),
            _ => Err(ReadError::Flag { flag }),
        }
    }
}

#[cfg(test)]
mod tests;
