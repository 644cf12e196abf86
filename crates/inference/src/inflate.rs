//! Decompresses a message piece by piece, handing what comes out to the field walk and keeping none of it.
//!
//! gRPC's `gzip` is RFC 1952 and its `deflate` is zlib, RFC 1950. A bomb costs as much work as the walk's limit allows.
//! The checksum of a gzip stream is left to the engine, which reads the same bytes.

use base::ModelName;
use flate2::{Decompress, FlushDecompress, Status};

use crate::{ReadError, fields::Fields};

/// Decompressed bytes on their way to the walk.
const PIECE_BYTES: usize = 4096;
/// CRC32 and ISIZE (RFC 1952 §2.3.1).
const GZIP_TRAILER_BYTES: usize = 8;

/// A compressed stream and where it stands.
#[derive(Debug)]
pub(crate) struct Inflate {
    stage: Stage,
    stream: Decompress,
    trailer_bytes: usize,
    limit: usize,
    /// What is left of `limit` for compressed bytes: a stream can be long and decompress to nothing.
    room: usize,
}

#[derive(Debug)]
enum Stage {
    Header(GzipHeader),
    Stream,
    Trailer { left: usize },
}

impl Inflate {
    /// A zlib stream.
    pub(crate) fn zlib(limit: usize) -> Self {
        Self {
            stage: Stage::Stream,
            stream: Decompress::new(true),
            trailer_bytes: 0,
            limit,
            room: limit,
        }
    }

    /// A gzip stream of one member.
    pub(crate) fn gzip(limit: usize) -> Self {
        Self {
            stage: Stage::Header(GzipHeader::default()),
            stream: Decompress::new(false),
            trailer_bytes: GZIP_TRAILER_BYTES,
            limit,
            room: limit,
        }
    }

    /// Decompresses the next bytes into `fields`; `Some` once the name is complete.
    pub(crate) fn push(
        &mut self,
        data: &[u8],
        fields: &mut Fields,
    ) -> Result<Option<ModelName>, ReadError> {
        let (mut data, beyond) = data.split_at(data.len().min(self.room));
        self.room -= data.len();
        while !data.is_empty() {
            match &mut self.stage {
                Stage::Header(header) => {
                    let (byte, rest) = data.split_at(1);
                    data = rest;
                    if header.push(byte[0])? {
                        self.stage = Stage::Stream;
                    }
                }
                Stage::Stream => {
                    if let Some(name) = self.inflate(&mut data, fields)? {
                        return Ok(Some(name));
                    }
                }
                Stage::Trailer { left } => {
                    // A second gzip member would go unread here and not at the engine.
                    *left = left.checked_sub(data.len()).ok_or(ReadError::Compressed)?;
                    data = &[];
                }
            }
        }
        if beyond.is_empty() { Ok(None) } else { Err(ReadError::TooFar { limit: self.limit }) }
    }

    /// The message ends here.
    pub(crate) fn end(&self, fields: &Fields) -> Result<(), ReadError> {
        match self.stage {
            Stage::Trailer { left: 0 } => fields.end(),
            _ => Err(ReadError::Truncated),
        }
    }

    /// Runs until `data` is used up or the stream ends.
    fn inflate(
        &mut self,
        data: &mut &[u8],
        fields: &mut Fields,
    ) -> Result<Option<ModelName>, ReadError> {
        let mut piece = [0; PIECE_BYTES];
        loop {
            let (before_in, before_out) = (self.stream.total_in(), self.stream.total_out());
            let status = self.stream.decompress(data, &mut piece, FlushDecompress::None);
            let taken = (self.stream.total_in() - before_in) as usize;
            let given = (self.stream.total_out() - before_out) as usize;
            *data = &data[taken..];
            if let Some(name) = fields.push(&piece[..given])? {
                return Ok(Some(name));
            }
            // Only now: what came out before the fault counts, however the stream was cut into pieces.
            let status = status.map_err(|_| ReadError::Compressed)?;
            if status == Status::StreamEnd {
                self.stage = Stage::Trailer { left: self.trailer_bytes };
                return Ok(None);
            }
            if taken == 0 && given == 0 {
                return if data.is_empty() { Ok(None) } else { Err(ReadError::Compressed) };
            }
        }
    }
}

/// The header of a gzip member (RFC 1952 §2.3): ten fixed bytes, then the optional parts their flags name.
#[derive(Debug)]
struct GzipHeader {
    part: GzipPart,
    /// Flags of the parts still to come.
    flags: u8,
}

#[derive(Debug)]
enum GzipPart {
    Fixed {
        at: u8,
    },
    ExtraLength {
        low: Option<u8>,
    },
    Extra {
        left: u16,
    },
    /// A file name or a comment: up to and with a zero byte.
    Text,
    Checksum {
        left: u8,
    },
}

const FIXED_BYTES: u8 = 10;
const FLAG_CHECKSUM: u8 = 1 << 1;
const FLAG_EXTRA: u8 = 1 << 2;
const FLAG_NAME: u8 = 1 << 3;
const FLAG_COMMENT: u8 = 1 << 4;
const FLAGS_RESERVED: u8 = 0b1110_0000;

impl Default for GzipHeader {
    fn default() -> Self {
        Self { part: GzipPart::Fixed { at: 0 }, flags: 0 }
    }
}

impl GzipHeader {
    /// Takes the next byte; true after the last one.
    fn push(&mut self, byte: u8) -> Result<bool, ReadError> {
        let part_ends = match &mut self.part {
            GzipPart::Fixed { at } => {
                match (*at, byte) {
                    (0, 0x1f) | (1, 0x8b) | (2, 8) | (4.., _) => {}
                    (3, flags) if flags & FLAGS_RESERVED == 0 => self.flags = flags,
                    _ => return Err(ReadError::Compressed),
                }
                *at += 1;
                *at == FIXED_BYTES
            }
            GzipPart::ExtraLength { low: low @ None } => {
                *low = Some(byte);
                false
            }
            GzipPart::ExtraLength { low: Some(low) } => {
                let left = u16::from_le_bytes([*low, byte]);
                self.part = GzipPart::Extra { left };
                left == 0
            }
            GzipPart::Extra { left } => {
                *left -= 1;
                *left == 0
            }
            GzipPart::Text => byte == 0,
            GzipPart::Checksum { left } => {
                *left -= 1;
                *left == 0
            }
        };
        Ok(part_ends && !self.begin_next_part())
    }

    /// Begins the next part the flags name; false when there is none.
    fn begin_next_part(&mut self) -> bool {
        let in_order = [
            (FLAG_EXTRA, GzipPart::ExtraLength { low: None }),
            (FLAG_NAME, GzipPart::Text),
            (FLAG_COMMENT, GzipPart::Text),
            (FLAG_CHECKSUM, GzipPart::Checksum { left: 2 }),
        ];
        for (flag, part) in in_order {
            if self.flags & flag != 0 {
                self.flags &= !flag;
                self.part = part;
                return true;
            }
        }
        false
    }
}
