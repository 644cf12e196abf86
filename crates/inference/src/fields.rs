//! Finds one string among the fields of a protobuf message that arrives in pieces
//! (<https://protobuf.dev/programming-guides/encoding/>).
//!
//! Fields may come in any order; those not wanted are counted past, never kept. The only memory is the name itself and
//! the open groups, both bounded.

use base::ModelName;

use crate::ReadError;

/// Longest name worth gathering: more than [`ModelName`] allows, so that its own refusal reports the near misses.
const NAME_MAX_BYTES: usize = 1024;
/// Deepest nesting of groups; protobuf's own decoders stop at the same depth.
const GROUPS_MAX: usize = 100;

/// Names gathered at once, at most: no encoder writes even two into one message.
const NAMES_MAX: usize = 64;

/// Where the walk stands.
#[derive(Debug)]
pub(crate) struct Fields {
    wanted: u32,
    limit: usize,
    /// What is left of `limit`.
    room: usize,
    /// Field numbers of the groups around the current field. Groups are long deprecated, but legal as unknown fields.
    groups: Vec<u32>,
    step: Step,
    /// Every name so far, where not only the first is asked for.
    all: Option<Vec<ModelName>>,
}

/// What the next bytes belong to.
#[derive(Debug)]
enum Step {
    Tag(Varint),
    /// The value of a varint field.
    Value(Varint),
    Length {
        varint: Varint,
        wanted: bool,
    },
    /// The content of a field nobody asked for.
    Skip {
        left: usize,
    },
    Name {
        left: usize,
        text: Vec<u8>,
    },
}

impl Fields {
    pub(crate) fn new(wanted: u32, limit: usize) -> Self {
        Self { wanted, limit, room: limit, groups: Vec::new(), step: Step::next(), all: None }
    }

    /// A walk to the end of the message, past every name.
    pub(crate) fn to_the_end(wanted: u32, limit: usize) -> Self {
        Self { all: Some(Vec::new()), ..Self::new(wanted, limit) }
    }

    /// The names found since the last time, of a walk to the end.
    pub(crate) fn take(&mut self) -> Vec<ModelName> {
        self.all.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Walks over the next bytes of the message; `Some` once the name is complete.
    pub(crate) fn push(&mut self, mut data: &[u8]) -> Result<Option<ModelName>, ReadError> {
        while !data.is_empty() {
            if self.room == 0 {
                return Err(self.too_far());
            }
            let taken = match &self.step {
                Step::Skip { left } | Step::Name { left, .. } => {
                    data.len().min(*left).min(self.room)
                }
                Step::Tag(_) | Step::Value(_) | Step::Length { .. } => 1,
            };
            let (piece, rest) = data.split_at(taken);
            self.room -= taken;
            data = rest;
            if let Some(name) = self.walk(piece)? {
                match &mut self.all {
                    Some(all) if all.len() < NAMES_MAX => all.push(name),
                    Some(_) => return Err(ReadError::Malformed),
                    None => return Ok(Some(name)),
                }
            }
        }
        Ok(None)
    }

    /// The message ends here: fine between fields, truncated anywhere else.
    pub(crate) fn end(&self) -> Result<(), ReadError> {
        match &self.step {
            Step::Tag(varint) if varint.is_empty() && self.groups.is_empty() => Ok(()),
            _ => Err(ReadError::Truncated),
        }
    }

    /// How many bytes the walk has seen.
    #[cfg(test)]
    pub(crate) fn looked_at(&self) -> usize {
        self.limit - self.room
    }

    /// One step over `piece`: a byte of a number, or as much of a content as there is.
    fn walk(&mut self, piece: &[u8]) -> Result<Option<ModelName>, ReadError> {
        match &mut self.step {
            Step::Tag(varint) => {
                if let Some(tag) = varint.push(piece)? {
                    self.step = self.after_tag(tag)?;
                }
            }
            Step::Value(varint) => {
                if varint.push(piece)?.is_some() {
                    self.step = Step::next();
                }
            }
            Step::Length { varint, wanted } => {
                let wanted = *wanted;
                if let Some(length) = varint.push(piece)? {
                    self.step = self.after_length(length, wanted)?;
                }
            }
            Step::Skip { left } => {
                *left -= piece.len();
                if *left == 0 {
                    self.step = Step::next();
                }
            }
            Step::Name { left, text } => {
                *left -= piece.len();
                text.extend_from_slice(piece);
                if *left == 0 {
                    let text = std::str::from_utf8(text).map_err(|_| ReadError::NameText)?;
                    let name = text.parse()?;
                    self.step = Step::next();
                    return Ok(Some(name));
                }
            }
        }
        Ok(None)
    }

    fn after_tag(&mut self, tag: u64) -> Result<Step, ReadError> {
        // A tag has 32 bits: 29 of field number, 3 of wire type.
        let number = u32::try_from(tag).map_err(|_| ReadError::Malformed)? >> 3;
        if number == 0 {
            return Err(ReadError::Malformed);
        }
        let wanted = number == self.wanted && self.groups.is_empty();
        match tag & 7 {
            2 => Ok(Step::Length { varint: Varint::default(), wanted }),
            // A model that is not a string: some decoders refuse it, others pass it over.
            _ if wanted => Err(ReadError::Malformed),
            0 => Ok(Step::Value(Varint::default())),
            1 => self.skip(8),
            5 => self.skip(4),
            3 if self.groups.len() < GROUPS_MAX => {
                self.groups.push(number);
                Ok(Step::next())
            }
            4 if self.groups.pop() == Some(number) => Ok(Step::next()),
            _ => Err(ReadError::Malformed),
        }
    }

    fn after_length(&self, length: u64, wanted: bool) -> Result<Step, ReadError> {
        let length = usize::try_from(length).map_err(|_| self.too_far())?;
        match (length, wanted) {
            // proto3: an empty string says the same as none.
            (0, _) => Ok(Step::next()),
            (_, false) => self.skip(length),
            (..=NAME_MAX_BYTES, true) => {
                Ok(Step::Name { left: length, text: Vec::with_capacity(length) })
            }
            (bytes, true) => Err(ReadError::NameLength { bytes }),
        }
    }

    /// Passes over the next bytes; a field that reaches beyond the limit is refused before anyone waits for its end.
    fn skip(&self, left: usize) -> Result<Step, ReadError> {
        if left <= self.room { Ok(Step::Skip { left }) } else { Err(self.too_far()) }
    }

    fn too_far(&self) -> ReadError {
        ReadError::TooFar { limit: self.limit }
    }
}

impl Step {
    /// Between two fields.
    fn next() -> Self {
        Self::Tag(Varint::default())
    }
}

/// A number of at most 64 bits, seven per byte, lowest first.
#[derive(Debug, Default)]
struct Varint {
    value: u64,
    bits: u32,
}

impl Varint {
    /// Takes the next bytes of the number, none beyond it; `Some` after the last one.
    fn push(&mut self, piece: &[u8]) -> Result<Option<u64>, ReadError> {
        for byte in piece {
            if self.bits == 63 && *byte > 1 {
                return Err(ReadError::Malformed);
            }
            self.value |= u64::from(byte & 0x7f) << self.bits;
            self.bits += 7;
            if byte & 0x80 == 0 {
                return Ok(Some(self.value));
            }
        }
        Ok(None)
    }

    fn is_empty(&self) -> bool {
        self.bits == 0
    }
}
