"""Private parts that loaders share.

`record`
    One JSON object or table row, with typed access to its fields.
`text_files`
    Lines, byte-order marks and digests of text files.
`json_stream`
    Large JSON files, one record at a time.
`tables`
    Tables as records.
`records`
    Records of JSON lines, JSON arrays or tables.
`box_frames`
    Conversion of annotated boxes into pixels of the loaded image.
`image_folder`
    The images that records refer to.
`annotation_questions`
    Yes-no questions about annotated objects, colors and relations.
`caption_questions`
    Questions about true and false captions.
`assembly`
    The dataset, with its provenance.
"""
