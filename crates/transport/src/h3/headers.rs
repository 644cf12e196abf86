//! Field sections to and from `http` types, with the rules of RFC 9114 §4.2 and §4.3.
//!
//! A message that breaks them is malformed: an error of its stream only, never of the connection.

use bytes::{BufMut, Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    header, uri,
};

use super::qpack::{self, QpackError};

/// Why a field section is not the head or the trailers of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SectionError {
    #[error(transparent)]
    Qpack(#[from] QpackError),
    /// RFC 9114 §4.1.2: a stream error of type H3_MESSAGE_ERROR.
    #[error("malformed message: {0}")]
    Malformed(&'static str),
}

fn malformed<T>(why: &'static str) -> Result<T, SectionError> {
    Err(SectionError::Malformed(why))
}

/// Fields that mean a connection, which HTTP/3 does not have (§4.2).
const CONNECTION_FIELDS: [HeaderName; 4] = [
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
];

fn is_connection_field(name: &HeaderName) -> bool {
    CONNECTION_FIELDS.contains(name) || name == "proxy-connection"
}

/// Fields no table on the way should remember (RFC 9204 §7.1.3).
fn is_secret(name: &HeaderName) -> bool {
    *name == header::AUTHORIZATION
        || *name == header::PROXY_AUTHORIZATION
        || *name == header::COOKIE
}

/// The size of a section as §4.2.2 counts it, in bytes.
fn section_bytes(headers: &HeaderMap, pseudo_bytes: usize) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum::<usize>()
        + pseudo_bytes
}

/// Encodes the head of a request. `Err` with its size when the peer's limit is below it.
pub(crate) fn encode_request(
    head: &http::request::Parts,
    peer_limit_bytes: Option<u64>,
) -> Result<BytesMut, usize> {
    let path = head.uri.path_and_query().map_or("/", uri::PathAndQuery::as_str);
    let authority = head.uri.authority().map_or("", uri::Authority::as_str);
    let scheme = head.uri.scheme_str().unwrap_or("https");
    let pseudo_bytes =
        path.len() + authority.len() + scheme.len() + head.method.as_str().len() + 160;
    check_size(&head.headers, pseudo_bytes, peer_limit_bytes)?;
    let mut encoder = qpack::Encoder::new(BytesMut::with_capacity(256));
    encoder.line(":method", head.method.as_str().as_bytes(), false);
    encoder.line(":scheme", scheme.as_bytes(), false);
    if !authority.is_empty() {
        encoder.line(":authority", authority.as_bytes(), false);
    }
    encoder.line(":path", path.as_bytes(), false);
    encode_fields(&mut encoder, &head.headers);
    Ok(encoder.finish())
}

/// Encodes the head of a response. `Err` with its size when the peer's limit is below it.
pub(crate) fn encode_response(
    head: &http::response::Parts,
    peer_limit_bytes: Option<u64>,
) -> Result<BytesMut, usize> {
    check_size(&head.headers, 42, peer_limit_bytes)?;
    let mut encoder = qpack::Encoder::new(BytesMut::with_capacity(256));
    encoder.line(":status", head.status.as_str().as_bytes(), false);
    encode_fields(&mut encoder, &head.headers);
    Ok(encoder.finish())
}

/// An interim response without fields, as a HEADERS frame.
pub(crate) fn interim(status: StatusCode) -> BytesMut {
    let mut encoder = qpack::Encoder::new(BytesMut::with_capacity(8));
    encoder.line(":status", status.as_str().as_bytes(), false);
    frame(&encoder.finish())
}

/// Encodes trailers. `Err` with their size when the peer's limit is below it.
pub(crate) fn encode_trailers(
    trailers: &HeaderMap,
    peer_limit_bytes: Option<u64>,
) -> Result<BytesMut, usize> {
    check_size(trailers, 0, peer_limit_bytes)?;
    let mut encoder = qpack::Encoder::new(BytesMut::with_capacity(128));
    encode_fields(&mut encoder, trailers);
    Ok(encoder.finish())
}

fn check_size(headers: &HeaderMap, pseudo: usize, limit: Option<u64>) -> Result<(), usize> {
    let size = section_bytes(headers, pseudo);
    if limit.is_some_and(|limit| size as u64 > limit) { Err(size) } else { Ok(()) }
}

fn encode_fields(encoder: &mut qpack::Encoder, headers: &HeaderMap) {
    for (name, value) in headers {
        if !is_connection_field(name) && *name != header::HOST {
            encoder.line(name.as_str(), value.as_bytes(), value.is_sensitive() || is_secret(name));
        }
    }
}

/// What a section said before its ordinary fields, and those fields.
#[derive(Default)]
struct Section {
    method: Option<Bytes>,
    scheme: Option<Bytes>,
    authority: Option<Bytes>,
    path: Option<Bytes>,
    status: Option<Bytes>,
    fields: HeaderMap,
    fields_began: bool,
}

fn decode(section: &Bytes, limit_bytes: usize) -> Result<Section, SectionError> {
    let mut out = Section::default();
    qpack::decode(section, limit_bytes, |name, value| {
        if name.first() == Some(&b':') { out.pseudo(&name, value) } else { out.field(&name, value) }
    })?;
    Ok(out)
}

impl Section {
    fn pseudo(&mut self, name: &[u8], value: Bytes) -> Result<(), SectionError> {
        if self.fields_began {
            return malformed("a pseudo-header field after an ordinary one");
        }
        let slot = match name {
            b":method" => &mut self.method,
            b":scheme" => &mut self.scheme,
            b":authority" => &mut self.authority,
            b":path" => &mut self.path,
            b":status" => &mut self.status,
            _ => return malformed("an unknown pseudo-header field"),
        };
        if slot.replace(value).is_some() {
            return malformed("a repeated pseudo-header field");
        }
        Ok(())
    }

    fn field(&mut self, name: &[u8], value: Bytes) -> Result<(), SectionError> {
        self.fields_began = true;
        if name.iter().any(u8::is_ascii_uppercase) {
            return malformed("a field name in upper case");
        }
        let Ok(name) = HeaderName::from_bytes(name) else {
            return malformed("a field name with forbidden characters");
        };
        let Ok(mut value) = HeaderValue::from_maybe_shared(value) else {
            return malformed("a field value with forbidden characters");
        };
        if is_connection_field(&name) {
            return malformed("a connection-specific field");
        }
        if name == header::TE && value != "trailers" {
            return malformed("a te field other than trailers");
        }
        value.set_sensitive(is_secret(&name));
        self.fields.append(name, value);
        Ok(())
    }
}

/// Decodes the head of a request.
pub(crate) fn decode_request(
    section: &Bytes,
    limit_bytes: usize,
) -> Result<Request<()>, SectionError> {
    let section = decode(section, limit_bytes)?;
    if section.status.is_some() {
        return malformed(":status in a request");
    }
    let (Some(method), Some(scheme), Some(path)) = (section.method, section.scheme, section.path)
    else {
        return malformed("a request without :method, :scheme or :path");
    };
    let Ok(method) = Method::from_bytes(&method) else {
        return malformed("a method with forbidden characters");
    };
    if method == Method::CONNECT {
        return malformed("CONNECT, which this end does not serve");
    }
    let host = section.fields.get(header::HOST).map(HeaderValue::as_bytes);
    let authority = match (section.authority, host) {
        (Some(authority), Some(host)) if authority != host => {
            return malformed("host differs from :authority");
        }
        (Some(authority), _) => authority,
        (None, Some(host)) => Bytes::copy_from_slice(host),
        (None, None) => return malformed("a request without :authority or host"),
    };
    if section.fields.get_all(header::HOST).iter().count() > 1 {
        return malformed("a repeated host field");
    }
    let mut parts = uri::Parts::default();
    parts.scheme = uri::Scheme::try_from(&scheme[..]).ok();
    parts.authority = uri::Authority::from_maybe_shared(authority).ok();
    parts.path_and_query = uri::PathAndQuery::from_maybe_shared(path).ok();
    if parts.scheme.is_none() || parts.authority.is_none() || parts.path_and_query.is_none() {
        return malformed(":scheme, :authority or :path that is not part of a URI");
    }
    let Ok(uri) = Uri::from_parts(parts) else {
        return malformed(":scheme, :authority and :path that make no URI");
    };
    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.version_mut() = Version::HTTP_3;
    *request.headers_mut() = section.fields;
    request.headers_mut().remove(header::HOST);
    Ok(request)
}

/// Decodes the head of a response, interim or final.
pub(crate) fn decode_response(
    section: &Bytes,
    limit_bytes: usize,
) -> Result<Response<()>, SectionError> {
    let section = decode(section, limit_bytes)?;
    if section.method.is_some()
        || section.scheme.is_some()
        || section.authority.is_some()
        || section.path.is_some()
    {
        return malformed("a request's pseudo-header field in a response");
    }
    let Some(status) = section.status.and_then(|status| StatusCode::from_bytes(&status).ok())
    else {
        return malformed("a response without a :status of three digits");
    };
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return malformed("status 101, which HTTP/3 does not have");
    }
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.version_mut() = Version::HTTP_3;
    *response.headers_mut() = section.fields;
    Ok(response)
}

/// Decodes trailers: no pseudo-header fields (§4.3).
pub(crate) fn decode_trailers(
    section: &Bytes,
    limit_bytes: usize,
) -> Result<HeaderMap, SectionError> {
    let section = decode(section, limit_bytes)?;
    if section.method.is_some()
        || section.scheme.is_some()
        || section.authority.is_some()
        || section.path.is_some()
        || section.status.is_some()
    {
        return malformed("a pseudo-header field in trailers");
    }
    Ok(section.fields)
}

/// The `content-length` of a message; `Err` when it is not one number (RFC 9110 §8.6).
pub(crate) fn content_length(headers: &HeaderMap) -> Result<Option<u64>, SectionError> {
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    let Some(first) = lengths.next() else { return Ok(None) };
    if lengths.any(|other| other != first) {
        return malformed("content-length fields that differ");
    }
    match first.to_str().ok().filter(|t| t.bytes().all(|b| b.is_ascii_digit())).map(str::parse) {
        Some(Ok(length)) => Ok(Some(length)),
        _ => malformed("a content-length that is not a number"),
    }
}

/// Wraps an encoded section in a HEADERS frame.
pub(crate) fn frame(section: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(section.len() + 16);
    super::frame::put_headers(&mut out, section);
    out
}

/// Appends DATA to `out`: small pieces are copied, so that a small view does not pin a large buffer; for large ones only
/// the frame header is written and the piece is handed back to be sent as it is.
pub(crate) fn put_data(out: &mut BytesMut, data: Bytes, copy_below_bytes: usize) -> Option<Bytes> {
    super::frame::put_data_header(out, data.len());
    if data.len() < copy_below_bytes {
        out.put_slice(&data);
        None
    } else {
        Some(data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(lines: &[(&str, &str)]) -> Bytes {
        let mut encoder = qpack::Encoder::new(BytesMut::new());
        for (name, value) in lines {
            encoder.line(name, value.as_bytes(), false);
        }
        encoder.finish().freeze()
    }

    const HEAD: [(&str, &str); 4] =
        [(":method", "POST"), (":scheme", "https"), (":authority", "a:1"), (":path", "/p.S/M?q=1")];

    fn request(more: &[(&str, &str)]) -> Result<Request<()>, SectionError> {
        decode_request(&section(&[&HEAD, more].concat()), 16_384)
    }

    #[test]
    fn a_request_survives_the_round_trip() {
        let got =
            request(&[("te", "trailers"), ("x", "1"), ("x", "2"), ("k-bin", "AAE=")]).unwrap();
        let (head, ()) = got.into_parts();
        let again = decode_request(&encode_request(&head, None).unwrap().freeze(), 16_384).unwrap();
        assert_eq!(again.uri(), "https://a:1/p.S/M?q=1");
        assert_eq!(again.method(), Method::POST);
        assert_eq!(again.headers(), &head.headers);
        assert_eq!(again.headers().get_all("x").iter().count(), 2);
    }

    #[test]
    fn small_pieces_are_copied_next_to_their_header_and_large_ones_are_not() {
        let mut out = BytesMut::new();
        assert_eq!(put_data(&mut out, Bytes::from_static(b"abc"), 4), None);
        assert_eq!(&out[..], b"\x00\x03abc");
        let whole = put_data(&mut out, Bytes::from_static(b"abcd"), 4);
        assert_eq!(whole.as_deref(), Some(&b"abcd"[..]));
        assert_eq!(&out[..], b"\x00\x03abc\x00\x04");
    }

    #[test]
    fn host_must_agree_with_authority_and_may_replace_it() {
        assert!(request(&[("host", "a:1")]).is_ok());
        assert_eq!(
            request(&[("host", "b:1")]).unwrap_err(),
            SectionError::Malformed("host differs from :authority")
        );
        let only_host = [(":method", "GET"), (":scheme", "https"), (":path", "/"), ("host", "h")];
        let got = decode_request(&section(&only_host), 999).unwrap();
        assert_eq!(got.uri().authority().unwrap(), "h");
    }

    #[test]
    fn malformed_requests_are_refused() {
        for more in [
            &[(":method", "POST")][..],
            &[("a", "b"), (":path", "/")],
            &[(":status", "200")],
            &[(":protocol", "x")],
            &[("Upper", "x")],
            &[("connection", "close")],
            &[("transfer-encoding", "chunked")],
            &[("keep-alive", "1")],
            &[("proxy-connection", "1")],
            &[("upgrade", "h2c")],
            &[("te", "gzip")],
            &[("bad name", "x")],
            &[("name", "line\nbreak")],
        ] {
            assert!(matches!(request(more), Err(SectionError::Malformed(_))), "{more:?}");
        }
        for missing in HEAD {
            let lines: Vec<_> = HEAD.into_iter().filter(|line| *line != missing).collect();
            assert!(decode_request(&section(&lines), 999).is_err(), "without {missing:?}");
        }
        let mut connect = HEAD.to_vec();
        connect[0].1 = "CONNECT";
        assert!(decode_request(&section(&connect), 999).is_err());
    }

    #[test]
    fn responses_and_trailers_keep_to_their_pseudo_headers() {
        assert_eq!(decode_response(&section(&[(":status", "103")]), 99).unwrap().status(), 103);
        for bad in [&[(":status", "20")][..], &[(":status", "101")], &[("a", "b")], &HEAD] {
            assert!(decode_response(&section(bad), 999).is_err(), "{bad:?}");
        }
        assert!(decode_trailers(&section(&[(":status", "200")]), 99).is_err());
        assert_eq!(
            decode_trailers(&section(&[("grpc-status", "0")]), 99).unwrap()["grpc-status"],
            "0"
        );
    }

    #[test]
    fn the_peers_limit_is_kept_before_sending() {
        let (head, ()) = request(&[("x", &"v".repeat(500))]).unwrap().into_parts();
        assert!(encode_request(&head, Some(400)).is_err());
        assert!(encode_request(&head, Some(1_000)).is_ok());
    }

    #[test]
    fn content_length_is_one_number() {
        let mut headers = HeaderMap::new();
        assert_eq!(content_length(&headers), Ok(None));
        headers.append(header::CONTENT_LENGTH, HeaderValue::from_static("5"));
        headers.append(header::CONTENT_LENGTH, HeaderValue::from_static("5"));
        assert_eq!(content_length(&headers), Ok(Some(5)));
        headers.append(header::CONTENT_LENGTH, HeaderValue::from_static("6"));
        assert!(content_length(&headers).is_err());
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("+5"));
        assert!(content_length(&headers).is_err());
    }
}
