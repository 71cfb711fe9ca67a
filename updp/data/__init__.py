"""Images for a network: a name -> data sets of tensors -> loaders. Transforms and most readers are timm's.

For example::

    config = data_config(model, spec.data)
    data = open_data("folder:~/images", input=spec.input, config=config)
    data.check_classes(1000)
    batches = loader(data.train(settings, seed=0, held_out=0.1), 64, train=True, seed=0)
"""

from updp.data.loading import ImageSet as ImageSet
from updp.data.loading import Loader as Loader
from updp.data.loading import StreamSet as StreamSet
from updp.data.loading import loader as loader
from updp.data.loading import stack as stack
from updp.data.opened import Data as Data
from updp.data.opened import open_data as open_data
from updp.data.sources import ImageError as ImageError
from updp.data.transforms import DataConfig as DataConfig
from updp.data.transforms import data_config as data_config
